"""`qlora-plan serve`: the planner behind HTTP, and the page that asks it (docs/serve.md)."""
