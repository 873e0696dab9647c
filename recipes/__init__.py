"""Recipes: functions that return a complete RunConfig, one data set a file.

A recipe takes the method, since some hyper-parameters are published per method, and nothing else;
every field can be changed on the command line or with `dataclasses.replace`.
"""
