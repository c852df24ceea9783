"""The run specification: what a person asks for, as YAML, and all its mistakes in one error."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from clusters.errors import Problem, RequestError
from clusters.mistakes import mistakes, shown
from clusters.yaml_file import PlainName, parse_yaml, read_yaml
from orchestrator.places import absolute, refuse_credentials, resolve
from qlora_core.catalogue import refuse_file
from qlora_core.data import CHAT_TEMPLATE, FormatName, Learn, is_address
from qlora_core.huggingface.adapter_config import continued, read_config
from qlora_core.recipe import Count, Recipe
from qlora_core.strategy import Attention, Loss, Offload, ZeroStage

Auto = Literal["auto"]
START = "Start from examples/demo.yaml"


def _path(value: str) -> str:
    """A validator: `value` could be a path."""
    if not value.strip() or "\0" in value:
        raise ValueError("it should be a path, not empty and without zero bytes")
    return value


def _address(value: str) -> str:
    """A validator: `value` is an address of object storage."""
    if not is_address(value):
        raise ValueError("it should be an address such as s3://bucket/folder")
    return value


def _pattern(value: str) -> str:
    """A validator: `value` names files inside a folder."""
    if not value.strip() or value.startswith(("/", "~")) or ".." in value.split("/"):
        raise ValueError("it should be a pattern of names inside the data's folder, such as data/*.jsonl")
    return value


def _template(value: str) -> str:
    """A validator: `value` is a chat template; by now a file has been read."""
    if "{{" not in value and "{%" not in value:
        raise ValueError("it should be a Jinja template, or the path of a file with one")
    return value


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    """A validator: no name comes twice."""
    if len(set(names)) < len(names):
        raise ValueError("each should be named once")
    return names


PathText = Annotated[str, AfterValidator(_path)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Reading(_Section):
    """How one dataset is read and learned from."""

    format: FormatName = "auto"
    """How a record is read; auto looks at the columns of the first one, and says what it found."""
    columns: dict[str, str] | None = None
    """What the data calls a format's columns: ``{prompt: question, completion: response}``."""
    learn: Learn = "auto"
    """Which tokens have a loss: the assistant's answers, the completion (the last answer), or all. auto: the answers,
    and of plain text all."""
    split: Annotated[str, Field(min_length=1)] | None = None
    """Of a folder, a dataset on disk or of the Hub; train, where nothing is said and there are any."""
    config: str | None = None
    """Of a dataset of the Hub: its subset."""
    files: Annotated[str, AfterValidator(_pattern)] | None = None
    """A glob such as ``data/*.jsonl``: which files of a folder or of a dataset of the Hub are read."""
    revision: str | None = None
    """Of a dataset of the Hub: a branch, a tag or a commit. A run goes on with the commit that it started with."""
    max_bad: Annotated[float, Field(ge=0)] = 0
    """Bad records that may be left out: how many, or below 1 their fraction; with more, nothing is started."""
    times: Annotated[float, Field(gt=0, le=1000)] = 1
    """How often an epoch has its examples: 2 is each of them twice, 0.1 a tenth of them, drawn by the seed."""


class DatasetSpec(_Reading):
    """One of several datasets that the model learns from."""

    path: PathText
    """Where it lies, as ``data.path`` says it."""


class DataSpec(_Reading):
    """What the model learns from: one dataset, or several."""

    path: PathText | None = None
    """A file of JSON lines, JSON, CSV or Parquet, a folder of these, a dataset saved to disk, relative to the
    specification's folder; a dataset of the Hub, ``org/name``; or an address such as ``s3://bucket/train.jsonl``."""
    datasets: Annotated[dict[PlainName, DatasetSpec], Field(min_length=1)] | None = None
    """Several datasets in place of one, each under a name of its own; then nothing is said of one beside them."""
    chat_template: Annotated[str, AfterValidator(_template)] | None = None
    """A Jinja file, relative to the specification's folder, or the template itself, for conversations; in place of the
    tokenizer's, which a base model's has none of. It is kept beside what is trained."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Part of each dataset's records that is held out for evaluation, each with all of its examples."""
    eval_path: PathText | None = None
    """Where the examples to evaluate on lie, in place of a part of these; as ``path``, and read alike."""
    eval_split: Annotated[str, Field(min_length=1)] | None = None
    """The split of ``eval_path``, or else of each dataset, that is evaluated on."""

    @property
    def learned(self) -> dict[str, DatasetSpec]:
        """The datasets that are learned from, by name; the only one has none."""
        if self.datasets is not None:
            return self.datasets
        return {"": DatasetSpec(**{name: getattr(self, name) for name in DatasetSpec.model_fields})}

    @property
    def evaluated(self) -> list[DatasetSpec]:
        """The datasets to evaluate on, where these are given; one with a path of its own is read as the data is."""
        if self.eval_path is not None:
            alike = {name: getattr(self, name) for name in ("format", "columns", "learn", "max_bad")}
            return [DatasetSpec(path=self.eval_path, split=self.eval_split, **alike)]
        if self.eval_split is not None:
            return [one.model_copy(update={"split": self.eval_split, "times": 1}) for one in self.learned.values()]
        return []

    @property
    def evaluates_other(self) -> bool:
        """Whether the examples to evaluate on are given, and not held out."""
        return self.eval_path is not None or self.eval_split is not None

    @property
    def evaluates(self) -> bool:
        """Whether there are any."""
        return self.evaluates_other or self.eval_fraction > 0


class StrategySpec(_Section):
    """How the step is spread over GPUs; what is `auto` the planner chooses, and says why."""

    world_size: Auto | Count = "auto"
    """Workers, one GPU each; on a CPU, processes."""
    micro_batch: Auto | Count = "auto"
    """Sequences of one forward pass on one GPU."""
    gradient_checkpointing: Auto | bool = "auto"
    """Recompute activations in the backward pass."""
    attention: Auto | Attention = "auto"
    """transformers' attention implementation."""
    loss: Auto | Loss = "auto"
    """Whether all logits exist at once."""
    paged_optimizer: Auto | bool = "auto"
    """Optimizer state in CUDA managed memory."""
    zero_stage: Auto | ZeroStage = "auto"
    """0 is plain torch; 1, 2 and 3 are DeepSpeed ZeRO."""
    offload: Auto | Offload = "auto"
    """What DeepSpeed keeps in host memory."""


class ClusterSpec(_Section):
    """A Ray cluster that is running already."""

    address: str
    """HOST:PORT of its head node."""


TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class TrackingSpec(_Section):
    """Who is told the figures of the run, beside metrics.jsonl. Addresses and keys come by environment alone."""

    to: Annotated[tuple[TrackerName, ...], AfterValidator(_once)] = ("tensorboard",)
    """TensorBoard writes into the run's folder. MLflow goes to MLFLOW_TRACKING_URI, else into the run's folder; Weights
    & Biases takes WANDB_API_KEY, or WANDB_MODE=offline."""
    project: PlainName = "qlora-orchestrator"
    """The experiment of MLflow and the project of Weights & Biases that the run belongs to."""


class CheckpointSpec(_Section):
    """When the trainable state is saved, and how much of it stays."""

    every_steps: Count = 50
    """Optimizer steps between two checkpoints; one more is written at the end and at an interrupt."""
    keep: Count = 2
    """Checkpoints that stay: the last so many, and the one with the best evaluation loss beside them."""
    storage: Annotated[str, AfterValidator(_address)] | None = None
    """An address, ``s3://bucket/folder``, to which each is copied too, and from which the run goes on elsewhere."""


class EvaluationSpec(_Section):
    """When the held-out examples are looked at, besides before the run and at each checkpoint but an interrupt's, and
    what follows.
    """

    every_steps: Count | None = None
    """Optimizer steps between two evaluations; nothing leaves it at the checkpoints."""
    patience: Count | None = None
    """So many checkpoints in a row without a lower loss end the run; nothing: it takes all its steps."""
    result: Literal["last", "best"] = "last"
    """Which checkpoint becomes the result: the last, or the one with the lowest loss."""


class RecoverySpec(_Section):
    """What follows a failure: docs/reliability.md."""

    retries: Annotated[int, Field(ge=0)] = 3
    """A run goes on after so many failures of one kind in a row, without a checkpoint in between; 0 ends it at any."""
    hang_minutes: Annotated[float, Field(gt=0)] = 30
    """When no worker has got on for so long, the attempt is ended; loading the base may take six times as long."""
    min_workers: Count | None = None
    """So many workers are enough to go on with when nodes are lost; nothing: it waits for as many as were planned."""
    wait_minutes: Annotated[float, Field(ge=0)] | None = None
    """So long an attempt waits for devices of a Ray cluster that others use; nothing: without end."""


class RunSpec(_Section):
    """One fine-tune, from its YAML file."""

    name: PlainName
    """Names the run; starting the same name again resumes it."""
    model: PathText
    """A folder with a model in the Hugging Face layout, relative to the specification's folder, or the address of one,
    ``s3://bucket/model``; else a catalogue's name or a Hub id, ``org/name``, both with or without ``@revision``."""
    adapter: PathText | None = None
    """A trained LoRA adapter to go on with, a folder in peft's layout, relative to the specification's folder. What the
    recipe does not say of it (rank, alpha, targets, dropout, DoRA, rsLoRA) is the adapter's."""
    data: DataSpec
    """What the model learns from."""
    recipe: Recipe = Recipe()
    """How one training step is computed."""
    strategy: Auto | StrategySpec = "auto"
    """How that step is spread over GPUs; auto lets the planner choose all of it."""
    cluster: Auto | ClusterSpec = "auto"
    """Where it runs: auto is this machine."""
    checkpoints: CheckpointSpec = CheckpointSpec()
    """When state is saved, and how much of it stays."""
    recovery: RecoverySpec = RecoverySpec()
    """What follows a failure."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """When held-out loss and perplexity are measured."""
    tracking: TrackingSpec = TrackingSpec()
    """Who is told the figures of the run."""
    output: PathText
    """The run's folder, relative to the specification's folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seeds the adapters, the split and the order of the data."""

    @property
    def strategy_request(self) -> StrategySpec:
        """The strategy section, all `auto` where there is none."""
        return StrategySpec() if self.strategy == "auto" else self.strategy


def load_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a run specification; paths in it become absolute.

    Args:
        path: the YAML file.
        overrides: ``field.path=value`` pairs that replace fields; the value is read as YAML.

    Raises:
        RequestError: with every mistake of the file and of the overrides.
    """
    fields = read_yaml(path, "run specification", START)
    problems = apply_overrides(fields, overrides) + take_adapter(fields, path.parent)
    problems += take_template(fields, path.parent) + one_or_several(fields) + evaluated_twice(fields)
    problems += model_file(fields, path.parent) + refuse_credentials(fields) + mistakes(RunSpec, fields)
    if problems:
        raise RequestError(problems)
    resolve(fields, path.parent)
    return RunSpec.model_validate(fields)


def apply_overrides(fields: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Put ``a.b=value`` pairs into `fields`; returns what was wrong with them."""
    problems = []
    for override in overrides:
        dotted, separator, text = override.partition("=")
        keys = dotted.split(".")
        if not separator or not all(keys):
            problems.append(
                Problem("override", shown(override), "it is no FIELD=VALUE pair", "Write recipe.rank=16, say")
            )
            continue
        try:
            value = parse_yaml(text)
        except ValueError as error:
            problems.append(Problem(dotted, shown(text), str(error), "Correct or quote it"))
            continue
        section = fields
        for depth, key in enumerate(keys[:-1], start=1):
            inner = section.get(key)
            if inner in (None, "auto"):
                inner = section[key] = {}
            if not isinstance(inner, dict):
                rule = f"{'.'.join(keys[:depth])} is no section: it is {shown(inner)}"
                problems.append(Problem(dotted, shown(value), rule, "Leave the override out, or correct its path"))
                break
            section = inner
        else:
            section[keys[-1]] = value
    return problems


def take_adapter(fields: dict[str, Any], folder: Path) -> list[Problem]:
    """Put what an adapter says of itself into a specification's recipe; returns what is wrong with the two."""
    adapter, recipe = fields.get("adapter"), fields.setdefault("recipe", {})
    if not isinstance(adapter, str) or not adapter.strip() or not isinstance(recipe, dict):
        return []  # told with the other fields' mistakes, if it is one
    if recipe.get("method") == "full":
        rule = "method full trains no adapter"
        return [Problem("adapter", shown(adapter), rule, "Leave it out, or choose method qlora or lora")]
    path = Path(absolute(folder, adapter))
    try:
        return continued(read_config(path), recipe, path)
    except RequestError as error:
        return list(error.problems)


def take_template(fields: dict[str, Any], folder: Path) -> list[Problem]:
    """Put the chat template of a file, or of the adapter to go on with, into a specification's data.

    Returns:
        What is wrong with the file.
    """
    data, adapter = fields.get("data"), fields.get("adapter")
    if not isinstance(data, dict):
        return []  # told with the other fields' mistakes
    given = data.get("chat_template")
    if given is None and isinstance(adapter, str) and "\0" not in adapter:
        before = os.path.join(absolute(folder, adapter), CHAT_TEMPLATE)
        given = before if os.path.isfile(before) else None
    if not isinstance(given, str) or "{" in given or "\0" in given:
        return []
    path = Path(absolute(folder, given))
    try:
        data["chat_template"] = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        data["chat_template"] = None  # told here, and not again as what is no template
        rule = f"the chat template cannot be read: {error.strerror if isinstance(error, OSError) else 'it is no text'}"
        return [Problem("data.chat_template", str(path), rule, "Give a Jinja file, or the template itself")]
    return []


def model_file(fields: dict[str, Any], folder: Path) -> list[Problem]:
    """What is wrong with a specification whose model is a file."""
    given = fields.get("model")
    if not isinstance(given, str) or "\0" in given:
        return []  # told with the other fields' mistakes
    try:
        refuse_file(given, absolute(folder, given), "model")
    except RequestError as error:
        return list(error.problems)
    return []


def one_or_several(fields: dict[str, Any]) -> list[Problem]:
    """What is wrong with a specification that names no data, or says of several datasets what each says itself."""
    data = fields.get("data")
    if not isinstance(data, dict):
        return []  # told with the other fields' mistakes
    if data.get("datasets") is None:
        missing = data.get("path") is None
        return [Problem("data.path", "", "it is required", "Add it, or several under data.datasets")] if missing else []
    rule = "several datasets are given, and each says this itself"
    return [
        Problem(f"data.{name}", shown(data[name]), rule, f"Move it to data.datasets.NAME.{name}, or leave it out")
        for name in DatasetSpec.model_fields
        if data.get(name) is not None
    ]


def evaluated_twice(fields: dict[str, Any]) -> list[Problem]:
    """What is wrong with a specification that holds examples out and gives others, or gives those that it learns."""
    data = fields.get("data")
    if not isinstance(data, dict) or (data.get("eval_path") is None and data.get("eval_split") is None):
        return []
    problems = []
    if data.get("eval_fraction"):
        rule = "the examples to evaluate on are given, so none are held out"
        problems.append(Problem("data.eval_fraction", shown(data["eval_fraction"]), rule, "Leave one of the two out"))
    datasets = data.get("datasets")
    learned = [each for each in datasets.values() if isinstance(each, dict)] if isinstance(datasets, dict) else [data]
    if data.get("eval_path") is None and any(data["eval_split"] == (one.get("split") or "train") for one in learned):
        rule, remedy = "these are the examples that are trained on", "Name another split, or an eval_path"
        problems.append(Problem("data.eval_split", shown(data["eval_split"]), rule, remedy))
    return problems


def schema() -> dict[str, Any]:
    """The JSON schema of a run specification, for editors; it describes every field."""
    document = RunSpec.model_json_schema()
    strategy_and_where = (StrategySpec, ClusterSpec, CheckpointSpec, RecoverySpec)
    for section in (RunSpec, DataSpec, DatasetSpec, Recipe, *strategy_and_where, EvaluationSpec, TrackingSpec):
        described = document if section is RunSpec else document["$defs"][section.__name__]
        for name, text in field_docs(section).items():
            described["properties"][name]["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


def field_docs(section: type[Any]) -> dict[str, str]:
    """The docstring under each field of a class; pydantic could read them too, but would do so at every start."""
    inherited = field_docs(_Reading) if issubclass(section, _Reading) and section is not _Reading else {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    return inherited | {
        field.target.id: inspect.cleandoc(doc.value.value)
        for field, doc in itertools.pairwise(getattr(definition, "body", ()))
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }
