"""What an upgrade is worth: scores, every alternative side by side, an analysis.

In reading order: `evaluate`, `reliability` (scores and confidence), `baselines`, `task`, `methods`, `compare` (every
way to upgrade in one table, with a verdict), `analyse` (what an adapter changes), `drift` and `upgrade` (prompts
across an upgrade of the base model), `retrieval` (an index over a bridge), `figures`, `report`.
"""
