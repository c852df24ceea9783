"""Decides and supervises: from a question to a plan, from a plan to a finished run. `from orchestrator import plan`."""

from orchestrator.facade import plan as plan
