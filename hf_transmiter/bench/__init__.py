"""Grids of experiments from one YAML file: the papers' tables, and your own.

In reading order: `protocols` (published splits and averages), `config` (the YAML file), `cells` (what one cell is, and
making it), `report` (tables and figures), `run` ([`run_bench`]).
"""
