"""Reading a model's ``config.json`` fields with their types and limits; mistakes are collected and reported once."""

from __future__ import annotations

from collections.abc import Mapping

from clusters.errors import Problem, RequestError
from qlora_core.architecture import ACTIVATIONS

MOST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "head_dim": 100_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 10_000_000_000,
    "num_experts": 100_000,
}
"""The largest values believed; anything above is a slip (a model of 10^12 layers), not a model."""

OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_experts": ("num_local_experts",),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
}
"""What older model types call a field (the ``attribute_map`` of transformers' configuration classes)."""


class ConfigFields:
    """The fields of one ``config.json``. A getter that meets a mistake notes it and returns a stand-in; `check` raises.

    Args:
        fields: the parsed JSON object.
        name, source: the model's name and where the config comes from; they go into every message.
    """

    def __init__(self, fields: Mapping[str, object], *, name: str, source: str) -> None:
        self.raw = fields
        self.name = name
        self.source = source
        self._problems: list[Problem] = []

    def size(self, field: str) -> int:
        """A required whole number of at least 1."""
        found, value = self._find(field)
        if found and value is not None:
            return self._whole(field, value)
        others = OTHER_NAMES.get(field, ())
        rule = f"this field is needed and missing{', also as ' if others else ''}{' or '.join(others)}"
        self.problem(field, "null" if found else "", rule, "Add it to the config")
        return 1

    def count(self, field: str, default: int, least: int = 1) -> int:
        """A whole number of at least `least`; `default` where it is absent or null."""
        _, value = self._find(field)
        return default if value is None else self._whole(field, value, least)

    def optional(self, field: str, absent: int | None = None) -> int | None:
        """A whole number of at least 1 or None; `absent` where the field is not there at all."""
        found, value = self._find(field)
        if not found:
            return absent
        return None if value is None else self._whole(field, value)

    def flag(self, field: str, default: bool) -> bool:
        """A truth value; `default` where it is absent or null."""
        _, value = self._find(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(field, _shown(value), "must be true or false", "Correct it")
            return default
        return value

    def text(self, field: str, default: str) -> str:
        """A string; `default` where it is absent or null."""
        _, value = self._find(field)
        if value is None:
            return default
        if not isinstance(value, str):
            self.problem(field, _shown(value), "must be a string", "Correct it")
            return default
        return value

    def activation(self, default: str) -> str:
        """The name of an activation that is modelled; `default` where the field is absent."""
        found, value = self._find("hidden_act")
        name = value if found else default
        if isinstance(name, str) and name in ACTIVATIONS:
            return name
        rule = f"must be an activation that is modelled: {', '.join(ACTIVATIONS)}"
        self.problem("hidden_act", _shown(name), rule, "Correct it, or choose another model")
        return default

    def part(
        self, field: str, model_types: tuple[str, ...], absent: Mapping[str, object], fixed: Mapping[str, object]
    ) -> ConfigFields:
        """A config within this one; without fields of its own where it is absent or null.

        Args:
            field: what it is called.
            model_types: the types that it can have, the default first.
            absent: the fields that it has where it leaves them out.
            fixed: the fields that it has whatever it says.
        """
        given = self.raw.get(field)
        if given is not None and not isinstance(given, Mapping):
            self.problem(field, type(given).__name__, "must be an object with the fields of that part", "Correct it")
        own = given if isinstance(given, Mapping) else {}
        part = ConfigFields({**absent, **own, **fixed}, name=self.name, source=f"{self.source}: {field}")
        if (named := part.text("model_type", model_types[0])) not in model_types:
            part.problem("model_type", named[:80], f"must be {' or '.join(model_types)}", "Choose another model")
        return part

    def per_layer(self, field: str, layers: int) -> list[object] | None:
        """A list with one entry for each layer, or None where it is absent or null."""
        _, value = self._find(field)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != layers:
            self.problem(
                field, _shown(value), f"must be a list with one entry for each of the {layers} layers", "Correct it"
            )
            return None
        return list(value)

    def is_empty(self, field: str) -> bool:
        """Whether the field is absent, null, zero or an empty list."""
        return not self._find(field)[1]

    def problem(self, field: str, given: str, rule: str, remedy: str) -> None:
        """Note a mistake, at the name that the config gives the field."""
        named = next((name for name in (field, *OTHER_NAMES.get(field, ())) if name in self.raw), field)
        self._problems.append(Problem(f"{self.source}: {named}", given, rule, remedy))

    def must_divide(self, field: str, part: int, whole_field: str, whole: int) -> None:
        """Note a mistake where `part` does not divide `whole`; not after other mistakes, they may be the cause."""
        if whole % part and not self._problems:
            self.problem(field, str(part), f"must divide {whole_field} {whole}", "Correct one of them")

    def check(self) -> None:
        """Raise all mistakes met so far.

        Raises:
            RequestError: there was at least one.
        """
        if self._problems:
            raise RequestError(list(dict.fromkeys(self._problems)))  # a field may have been read twice

    def _find(self, field: str) -> tuple[bool, object]:
        for name in (field, *OTHER_NAMES.get(field, ())):
            if name in self.raw:
                return True, self.raw[name]
        return False, None

    def _whole(self, field: str, value: object, least: int = 1) -> int:
        most = MOST.get(field, MOST["intermediate_size"])
        # bool is an int in Python; a config that says "num_hidden_layers": true is wrong all the same.
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        self.problem(field, _shown(value), f"must be a whole number from {least} to {most}", "Correct it")
        return least if least else 1


def _shown(value: object) -> str:
    """`value` as a message may quote it: short, and safe for integers too long to print."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
