"""The HTML frame and the style sheet of the report: light, dark and print."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} – distillation report</title>
<style>{css}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

CSS = """
:root { color-scheme: light dark;
  --paper: #fdfcf9; --ink: #1d1f23; --muted: #63676f; --rule: #d9d6ce; --shade: #f4f1ea;
  --c1: #1f6fb2; --c2: #d9730d; --c3: #878c95; --c4: #2f8f57; --c5: #c23b4a;
  --c6: #7a55b0; --c7: #148a92;
  --warn: #a8500a; --warn-back: #fdf1e0; --fine: #2c7a4b; --fine-back: #edf6ef;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
  --sans: "Inter", "Segoe UI", system-ui, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181c; --ink: #e8e6e1; --muted: #a2a5ab; --rule: #383b42; --shade: #1e2126;
  --c1: #62aef0; --c2: #f5a04c; --c3: #a5aab3; --c4: #63c48c; --c5: #f0808c;
  --c6: #b898ea; --c7: #4fc3cb;
  --warn: #f3b06a; --warn-back: #33271a; --fine: #7fd0a0; --fine-back: #1b2a21; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--serif); }
main { max-width: 1160px; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 1.4rem; margin-bottom: 1.8rem; }
.kicker { margin: 0; font: 600 .78rem/1 var(--sans); letter-spacing: .12em;
  text-transform: uppercase; color: var(--muted); }
h1 { font-size: 2.1rem; line-height: 1.2; margin: .6rem 0 1.2rem; font-weight: 600;
  overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; margin: 3rem 0 .9rem; font-weight: 600; overflow-wrap: anywhere; }
h3 { font-size: 1.08rem; margin: 0 0 .5rem; font-weight: 600; }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2.6rem; margin: 0; }
dt { font: 600 .75rem/1.4 var(--sans); color: var(--muted); } dd { margin: 0; }
aside { border-left: 4px solid; padding: .8rem 1.2rem; border-radius: 0 4px 4px 0; }
aside h2 { font-size: 1.05rem; margin: 0 0 .2rem; }
aside p, aside ul { margin: 0; color: var(--ink); }
aside ul { padding-left: 1.2rem; }
.warn { background: var(--warn-back); border-color: var(--warn); }
.warn h2, .flag { color: var(--warn); }
.fine { background: var(--fine-back); border-color: var(--fine); }
.fine h2, .holds { color: var(--fine); }
.does { color: var(--warn); } .open, .muted { color: var(--muted); }
.holds, .does, .open { font-weight: 600; white-space: nowrap; } .flag { font-style: italic; }
.note, figcaption { color: var(--muted); font-size: .9rem; max-width: 70ch; margin: .7rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font: .84rem/1.4 var(--sans);
  font-variant-numeric: tabular-nums lining-nums; }
th { text-align: left; color: var(--muted); font-weight: 600; vertical-align: bottom;
  border-bottom: 1px solid var(--ink); }
th, td { padding: .38rem .8rem .38rem 0; vertical-align: top; }
tr > :last-child { padding-right: 0; }
td { border-top: 1px solid var(--rule); } tbody tr:first-child td { border-top: 0; }
.recipe th { font: 600 1rem/1.3 var(--serif); color: var(--ink); padding-top: 1rem; border: 0; }
.recipe + tr td { border-top: 0; }
.num { text-align: right; white-space: nowrap; } th.num { white-space: normal; }
code { font: .94em var(--mono); overflow-wrap: anywhere; }
figure { margin: 0 0 2.8rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; } svg text { font-family: var(--sans); }
details { border-top: 1px solid var(--rule); padding: .5rem 0; } summary { cursor: pointer; }
details[open] summary { margin-bottom: .5rem; }
@media print { main { padding: 0; max-width: none; } details:not([open]) { display: none; } }
"""
