"""verify-data finds every broken file and accuses no sound one; runs honour the list (fault 19)."""

import dataclasses
import json
import os
import tarfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sample_images import broken_files, encoded, odd_files, picture, write_folder

from dfptkd.engine import run
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig, RunConfig
from dfptkd.engine.data import load_data, test_batches, train_batches, verify
from dfptkd.engine.data.loader import num_replaced
from dfptkd.engine.data.order import Stream, hash_bits, integers
from dfptkd.engine.data.quarantine import LIST_NAME, read_quarantine, replace_listed
from dfptkd.engine.errors import DataError

CPU = torch.device("cpu")


def load(root, **options):
    options = {"loader": "torchvision", "image_size": 24, "max_quarantined": 0.5, **options}
    return load_data(DataConfig(name="folder", root=str(root), **options), CPU)


def write_all(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_every_broken_file_is_found_and_no_other(tmp_path, capsys):
    write_all(tmp_path / "train" / "a", broken_files())
    write_all(tmp_path / "train" / "b", odd_files())
    write_all(tmp_path / "train" / "b", {"notes.txt": b"no image", "sound.jpg": encoded(picture())})
    assert main(["verify-data", str(tmp_path), "--workers", "2"]) == 3
    found = read_quarantine(tmp_path / LIST_NAME)
    assert set(found.images) == {f"train/a/{name}" for name in broken_files()}
    assert found.checked == len(broken_files()) + len(odd_files()) + 1
    assert found.images["train/a/empty.jpg"] == "empty"
    assert found.images["train/a/text.jpg"] == "not an image"
    said = capsys.readouterr().out
    for kind in ("CMYK", "16-bit", "animated", "JPEG named .png"):
        assert f"unusual, converted by the loaders: {kind}" in said


def test_sound_folder(tmp_path, capsys):
    write_folder(tmp_path)
    assert main(["verify-data", str(tmp_path)]) == 0
    assert read_quarantine(tmp_path / LIST_NAME).images == {}
    assert capsys.readouterr().out.startswith("20 images, 0 cannot be decoded")


def test_huge_is_reported_not_accused(monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "HUGE", 1000)
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    (member,) = verify.find_images(tmp_path)
    assert verify.look_at(member)[:3] == ("a.jpg", None, ["huge"])


def test_a_file_that_kills_its_process_is_named(tmp_path, monkeypatch):
    write_all(tmp_path, {f"{i}.jpg": encoded(picture(i)) for i in range(5)})
    real = verify.look_at

    def deadly(member):
        if member.name == "3.jpg":
            os._exit(9)
        return real(member)

    monkeypatch.setattr(verify, "look_at", deadly)  # workers are forked and have it too
    findings = verify.verify(verify.find_images(tmp_path), workers=2)
    assert findings.broken == {"3.jpg": "kills the process that decodes it"}
    assert findings.checked == 5


def test_members_of_tar_files_are_looked_at(tmp_path):
    write_all(tmp_path / "files", {"1.jpg": encoded(picture()), "2.jpg": b"", "2.cls": b"1"})
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for path in sorted((tmp_path / "files").iterdir()):
            tar.add(path, path.name)
            path.unlink()
    assert main(["verify-data", str(tmp_path)]) == 3
    assert read_quarantine(tmp_path / LIST_NAME).images == {"train-0.tar/2.jpg": "empty"}


@pytest.mark.parametrize("arguments", [["{}/none"], ["{}", "--workers", "0"], ["{}"]])
def test_refusals_are_one_line(tmp_path, arguments, capsys):
    code = main(["verify-data", *(a.format(tmp_path) for a in arguments)])
    said = capsys.readouterr().err
    assert code == (2 if "--workers" in arguments else 3)
    assert said.startswith("dfptkd: ")
    assert said.count("\n") == 1
    assert not (tmp_path / LIST_NAME).exists()


def test_a_list_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(encoded(picture()))
    code = main(["verify-data", str(tmp_path / "data"), "--out", str(tmp_path / "no" / "list")])
    assert code == 5
    assert "expected --out FILE elsewhere" in capsys.readouterr().err


def quarantined(root):
    """A folder of which 2 of 12 training images are broken and listed."""
    paths = write_folder(root)
    for path in (paths[1], paths[8]):
        path.write_bytes(b"")
    assert main(["verify-data", str(root)]) == 3
    return [1, 8]


def test_listed_images_are_replaced_alike_and_counted(tmp_path):
    listed = quarantined(tmp_path)
    data = load(tmp_path)
    assert data.notes[0].startswith("2 of 12 training images are in quarantine")
    seen, replaced = [], 0
    for epoch in range(6):
        options = {"batch_size": 5, "seed": 0, "epoch": epoch}
        first, second = (list(train_batches(data.train, **options)) for _ in range(2))
        assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
        for batch in first:
            assert not set(batch.indices.tolist()) & set(listed)
            assert torch.equal(batch.labels, batch.indices // 6)
            seen.append(batch.labels)
        replaced += num_replaced(data.train, **options, start=0, stop=2)
        # the images beside the replaced ones are those of the run without a list
        (tmp_path / LIST_NAME).rename(tmp_path / "away")
        plain = load(tmp_path).train
        (tmp_path / "away").rename(tmp_path / LIST_NAME)
        order = torch.cat(_rows(plain, **options))
        kept = ~torch.isin(order, torch.tensor(listed))
        assert torch.equal(torch.cat([b.indices for b in first])[kept], order[kept])
        assert torch.equal(torch.cat([b.labels for b in first]), plain.labels[order])
    assert replaced > 0
    assert torch.bincount(torch.cat(seen)).min() > 0


def _rows(split, *, batch_size, seed, epoch):
    from dfptkd.engine.data.order import epoch_order

    return epoch_order(seed, epoch, len(split)).split(batch_size)[:2]


def test_without_the_list_the_run_stops_and_names_the_file(tmp_path):
    quarantined(tmp_path)
    (tmp_path / LIST_NAME).unlink()
    data = load(tmp_path)
    with pytest.raises(DataError, match=r"train/.*jpg: cannot be decoded.*dfptkd verify-data"):
        list(train_batches(data.train, batch_size=12, seed=0, epoch=0))


def test_the_cap_is_kept(tmp_path):
    quarantined(tmp_path)
    with pytest.raises(DataError, match=r"2 of 12 training images .* at most 10 %"):
        load(tmp_path, max_quarantined=0.1)
    assert load(tmp_path, max_quarantined=2 / 12).train.listed.sum() == 2


def test_evaluation_never_replaces(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "val" / "bee" / "2.jpg").write_bytes(b"")
    list_file = tmp_path / "list.json"
    assert main(["verify-data", str(tmp_path), "--out", str(list_file)]) == 3
    with pytest.raises(DataError, match=r"val/bee/2.jpg: 1 of 8 test images are in quarantine"):
        load(tmp_path, quarantine=str(list_file))
    data = load(tmp_path, quarantine=str(list_file), skip_quarantined=True)
    assert data.notes == ["evaluated without 1 of 8 test images, which are in quarantine"]
    labels = torch.cat([b.labels for b in test_batches(data.test, batch_size=3)])
    assert labels.tolist() == [0] * 4 + [1] * 3


def test_images_on_the_device_are_replaced_too(tmp_path):
    listed = quarantined(tmp_path)
    files, resident = (load(tmp_path, loader=loader).train for loader in ("torchvision", "device"))
    for epoch in range(3):
        options = {"batch_size": 5, "seed": 0, "epoch": epoch}
        for a, b in zip(
            train_batches(files, **options), train_batches(resident, **options), strict=True
        ):
            assert torch.equal(a.indices, b.indices)
            assert b.images.flatten(1).float().std(dim=1).min() > 0
    assert resident.images[listed].eq(0).all()


def test_another_list_of_the_same_length_is_another_pipeline(tmp_path):
    quarantined(tmp_path)
    before = load(tmp_path).pipeline
    list_file = tmp_path / LIST_NAME
    text = list_file.read_text()
    list_file.write_text(text.replace("train/ant/1.jpg", "train/ant/2.jpg"))
    assert load(tmp_path).pipeline != before
    list_file.write_text(text)
    assert load(tmp_path).pipeline == before


def test_a_list_of_other_files_is_refused(tmp_path):
    quarantined(tmp_path)
    (tmp_path / LIST_NAME).unlink()
    list_file = tmp_path / "list.json"
    assert main(["verify-data", str(tmp_path / "train"), "--out", str(list_file)]) == 3
    with pytest.raises(DataError, match=r"list.json: 'ant/1.jpg' and the others are not below"):
        load(tmp_path, quarantine=str(list_file))


def test_replacements_are_drawn_within_the_class():
    """The vectorised choice against the plain one."""
    torch.manual_seed(0)
    labels, listed = torch.randint(0, 7, (300,)), torch.rand(300) < 0.3
    samples = torch.randperm(300)
    found = replace_listed(samples, listed, labels, seed=3, epoch=4)
    bits = hash_bits(3, 4, samples, Stream.REPLACEMENT)
    for place, sample in enumerate(samples.tolist()):
        expected = sample
        if listed[sample]:
            same = ((labels == labels[sample]) & ~listed).nonzero()[:, 0]
            expected = int(same[integers(bits[place], len(same))])
        assert found[place] == expected


def test_loaders_take_what_verify_data_looks_at(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "ant" / "._0.jpg").write_bytes(b"left by another system")
    assert main(["verify-data", str(tmp_path)]) == 0
    assert len(load(tmp_path).train) == 12


def test_linked_folders_and_damaged_tars(tmp_path):
    write_all(tmp_path / "train", {"1.jpg": encoded(picture()), "2.jpg": b""})
    (tmp_path / "val").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "loop").symlink_to(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    assert main(["verify-data", str(tmp_path)]) == 3
    found = read_quarantine(tmp_path / LIST_NAME)
    assert found.images == {
        "a.tar": "damaged or compressed tar file",
        "train/2.jpg": "empty",
        "val/2.jpg": "empty",
    }
    assert found.checked == 5


def test_only_what_was_under_way_is_looked_at_alone(tmp_path, monkeypatch):
    write_all(tmp_path, {f"{i:03}.jpg": encoded(picture(i % 3)) for i in range(300)})
    real, one, alone = verify.look_at, verify._alone, []

    def deadly(member):
        if member.name == "003.jpg":
            os._exit(9)
        return real(member)

    monkeypatch.setattr(verify, "look_at", deadly)
    monkeypatch.setattr(verify, "_CHUNK", 10)
    monkeypatch.setattr(verify, "_alone", lambda member: alone.append(member) or one(member))
    findings = verify.verify(verify.find_images(tmp_path), workers=2)
    assert list(findings.broken) == ["003.jpg"]
    assert findings.checked == 300
    assert len(alone) <= 40  # two chunks a worker


def test_eval_takes_the_options_that_it_names(tmp_path, capsys):
    write_folder(tmp_path)
    data = DataConfig(
        name="folder", root=str(tmp_path), image_size=24, loader="torchvision", workers=0
    )
    out = str(tmp_path / "run")
    run(
        RunConfig(
            method="ce", student="cifar:resnet8_s2", epochs=1, global_batch=4, data=data, out=out
        )
    )
    (tmp_path / "val" / "bee" / "2.jpg").write_bytes(b"")
    assert main(["verify-data", str(tmp_path)]) == 3
    assert main(["eval", out]) == 3
    assert "--data.skip-quarantined" in capsys.readouterr().err
    assert main(["eval", out, "--data.skip-quarantined"]) == 0
    assert "7 test images of folder (without 1 in quarantine)" in capsys.readouterr().out


def test_a_class_without_a_sound_image_takes_any():
    listed, labels = torch.tensor([True, True, False, False]), torch.tensor([0, 0, 1, 1])
    found = replace_listed(torch.tensor([0, 3, 1, 2]), listed, labels, seed=0, epoch=0)
    assert found[1] == 3
    assert found[3] == 2
    assert not listed[found].any()


def test_a_run_counts_replacements_and_resumes_exactly(tmp_path, capsys):
    quarantined(tmp_path)
    data = DataConfig(
        name="folder", root=str(tmp_path), image_size=24, max_quarantined=0.5, workers=0,
        loader="torchvision",
    )  # fmt: skip
    config = RunConfig(
        method="ce", student="cifar:resnet8_s2", epochs=3, global_batch=4, eval_batch=4, data=data
    )

    def train(out, **options):
        run(dataclasses.replace(config, out=str(tmp_path / out), **options))
        folder = tmp_path / out
        (newest,) = (folder / "checkpoints").glob("step-9") if not options else [None]
        status = json.loads((folder / "status.json").read_text())
        return status["replaced_images"], newest and load_file(newest / "state.safetensors")

    counted, whole = train("whole")
    assert counted > 0
    assert "2 of 12 training images are in quarantine" in capsys.readouterr().out
    part, _ = train("parts", max_steps=4, checkpoint_steps=1)  # in the middle of the second epoch
    state = json.loads((tmp_path / "parts/checkpoints/step-4/state.json").read_text())
    assert state["progress"]["replaced"] == part
    assert 0 < part < counted
    again, resumed = train("parts")
    assert again == counted
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole if k != "meter")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
LISTS = st.fixed_dictionaries(
    {"format": st.sampled_from(["dfptkd.quarantine/1", "x", 1]), "checked": JSON, "images": JSON}
)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200) | JSON.map(json.dumps) | LISTS.map(json.dumps))
def test_any_content_is_read_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / LIST_NAME
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        found = read_quarantine(path)
    except DataError as error:
        said = str(error)
    else:
        assert found.checked >= len(found.images)
        return
    assert said.startswith(str(path))
    assert "\n" not in said
