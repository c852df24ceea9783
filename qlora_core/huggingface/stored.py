"""Whether a model's files hold the model of its config, told by the names and shapes of what is stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.modules import in_layer, layers_of, modules_of

_BEFORE = (
    "",
    "model.",
    "transformer.",
    "gpt_neox.",
    "decoder.",
    "model.decoder.",
    "model.language_model.",
    "language_model.model.",
)
"""What files have before the decoder's layers: saved with their head or without, and beside a tower the names that
transformers gives now and those it gave before 4.52. Layers after anything else are not the decoder's: a tower's, or
those that predict further tokens."""

Shape = tuple[int, ...]


def unlike(architecture: ModelArchitecture, names: Collection[str], shape_of: Callable[[str], Shape | None]) -> str:
    """How what is stored differs from the model of the config, as a rule; nothing where it does not, or nobody can say.

    transformers leaves out layers that the config does not have, and only warns; a wrong shape fails in the workers.
    What goes by other names than the model's own is not judged: transformers may convert it as it loads.

    Args:
        names: of the tensors in the files.
        shape_of: gives the shape of one of them; None for what is packed, as 4-bit weights are.
    """
    modules, layers = modules_of(architecture.whole_type), architecture.num_layers
    before = "|".join(map(re.escape, _BEFORE))
    of_a_layer = re.compile(rf"(?:{before}){modules.layers.rpartition('.')[2]}\.(\d+)\.(.+)\.weight")
    stored = {(int(found[1]), found[2]): name for name in names if (found := of_a_layer.fullmatch(name))}
    wanted = {
        (number, in_layer(linear.path, number).removeprefix(f"{modules.layers}.{number}.")): linear
        for linear in architecture.linears
        for number in layers_of(architecture, linear)
    }
    known = {path for _, path in wanted} & {path for _, path in stored}
    there = {number for number, path in stored if path in known}
    if not there:
        return ""
    if max(there) + 1 != layers:
        return f"its files hold {max(there) + 1} layers, and its config.json says {layers}"
    if missing := [key for key in wanted if key[1] in known and key not in stored]:
        return f"its files lack the {missing[0][1]} of layer {missing[0][0]}, which by its config.json is there"
    shapes = {stored[key]: (one.out_features, one.in_features) for key, one in wanted.items() if key in stored}
    embedding = modules.outside[0].rpartition(".")[2]
    table = architecture.vocab_size, architecture.hidden_size
    shapes |= {name: table for place in _BEFORE if (name := f"{place}{embedding}.weight") in names}
    for name, shape in shapes.items():
        is_there = shape_of(name)
        if is_there is not None and is_there not in (shape, shape[::-1]):  # GPT-2's Conv1D has the input first
            return f"{name} is {list(is_there)} in its files, and by its config.json it is {list(shape)}"
    return ""
