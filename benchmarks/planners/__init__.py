"""Other planners on the steps that were measured on a Tesla T4, beside ours (docs/planners.md)."""
