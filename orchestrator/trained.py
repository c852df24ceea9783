"""What was trained, found again: a run's folder or an adapter's, its base on this machine, its held-out examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clusters.errors import request_error
from orchestrator.base import check_weights
from orchestrator.record import FILE_NAME, RunRecord, load_record
from qlora_core.catalogue import hub_id, refuse_file
from qlora_core.huggingface.hub import HubId, fetch_model, find_on_hub
from qlora_core.recipe import Recipe
from qlora_core.training.adapters import TrainedAdapter, read_adapter

INSTEAD = "Give the base model's folder, or its Hub id, with --base"


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter, and the run that made it where that is known.

    Attributes:
        name: the run's, or the folder's.
        adapter: its adapter, read and not loaded.
        run: the run's folder.
    """

    name: str
    adapter: TrainedAdapter
    run: Path | None = None
    record: RunRecord | None = None

    @property
    def held_out(self) -> Path | None:
        """The run's held-out examples, where there are any."""
        path = None if self.run is None else self.run / "data" / "eval.safetensors"
        return path if path is not None and path.is_file() else None

    @property
    def base_recipe(self) -> Recipe:
        """How the base was stored and computed in the run; unquantized where no run is known."""
        if self.record is None:
            return Recipe(method="lora", quantization="none")
        fields = self.record.plan["recipe"]
        chosen = ("method", "quantization", "double_quantization")
        return Recipe(**{field: fields[field] for field in chosen if field in fields})

    @property
    def compute_dtype(self) -> str:
        """In which the run computed; "auto" where that is not known."""
        return "auto" if self.record is None else str(self.record.identity.get("recipe.compute_dtype", "auto"))


def find_trained(folder: Path) -> Trained:
    """The adapter of a run's folder, or the one that is in `folder`.

    Raises:
        RequestError: there is none.
    """
    folder = folder.absolute()
    if (folder / FILE_NAME).is_file():
        adapter = folder / "adapter"
        if (folder / "model").is_dir():
            rule = "all weights were trained in it, so that its result is a whole model and no adapter"
            raise request_error("run", folder, rule, f"Use {folder / 'model'} as any model")
        if not adapter.is_dir():
            rule = "the run in it has not come to its end, so that there is no adapter yet"
            raise request_error("run", folder, rule, "Finish it, or give the adapter folder of a checkpoint in it")
        record = load_record(folder)
        name = folder.name if record is None else record.name
        return Trained(name, read_adapter(adapter), folder, record)
    adapted = read_adapter(folder)
    run = folder.parent if folder.name == "adapter" and (folder.parent / FILE_NAME).is_file() else None
    return Trained(folder.name, adapted, run, None if run is None else load_record(run))


def base_of(trained: Trained, given: str | None, tell: Callable[[str], None]) -> tuple[Path, str | None]:
    """The folder of the base model: the one that is `given`, or else the one that the adapter names.

    Args:
        tell: is told of each weight file before it is fetched from the Hub.

    Returns:
        It, and ``org/name`` where the Hub has it; None where a folder was named.

    Raises:
        RequestError: it is not to be found, or its weights are not whole or pickled.
    """
    named = given or str(trained.adapter.config.get("base_model_name_or_path") or "")
    folder = Path(named).expanduser()
    if named and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise request_error("base", folder, "the folder holds no config.json", INSTEAD)
        check_weights(folder)
        return folder, None
    refuse_file(named, str(folder), "base")
    hub = None if not named or folder.is_absolute() else hub_id(named)
    if hub is None:
        rule = "the base model is not there" if named else "the adapter does not name its base model"
        raise request_error("base", named, rule, INSTEAD)
    if given is None and hub.revision is None:
        hub = HubId(hub.repo, trained.adapter.config.get("revision"))
    model = find_on_hub(hub, "base", INSTEAD)
    folder = fetch_model(model, "base", INSTEAD, tell)
    check_weights(folder)
    return folder, hub.repo
