"""Grammars: JSON schemas, regular expressions, Lark grammars and tool calls that an answer is held to.

The work is done by llguidance: it knows the bytes of each token of the vocabulary, and says which may come next.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np

from onekernel.errors import BackendError, InvalidRequest
from onekernel.text import tool_calls
from onekernel.text.tokenizer import Tokenizer

# Without white space that nobody needs: a weak model could go on with it for ever.
COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarConstraint:
    """A `sampling.constraint.Constraint`: holds one answer to a grammar. The end tokens are allowed where it may end.

    Until `starts_after` has been chosen (the end of the thinking), everything is allowed, but for the end tokens.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, size: int, end_tokens: Sequence[int], starts_after: int | None
    ) -> None:
        self._matcher = matcher
        self._size = size
        self._waits_for = starts_after
        self._thinking = np.ones(size, bool)
        self._thinking[list(end_tokens)] = False

    def allowed(self) -> np.ndarray | None:
        if self._waits_for is not None:
            return self._thinking
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise BackendError(f"the grammar cannot be followed any further: {self._matcher.get_error()}")
        return np.unpackbits(bits, bitorder="little")[: self._size].view(bool)

    def accept(self, token: int) -> None:
        if self._waits_for is not None:
            if token == self._waits_for:
                self._waits_for = None
            return
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise BackendError(f"token {token} does not fit the grammar: {self._matcher.get_error()}")


Compiled = Callable[[int | None], GrammarConstraint]
"""A checked grammar: makes the constraint of one answer; the argument is `starts_after`, see there."""


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._loading = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None  # takes a second for 250,000 tokens: when it is needed

    def json_schema(self, schema: Any) -> Compiled:
        """An answer that is JSON of this schema (true or {}: any JSON).

        Raises:
            InvalidRequest: it is not a schema, or one that cannot be enforced; as all that follow.
        """
        return self._compile("JSON schema", _schema_grammar(schema))

    def json_object(self) -> Compiled:
        """An answer that is a JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Compiled:
        """An answer that matches a regular expression as a whole."""
        return self._compile("regular expression", llguidance.LLMatcher.grammar_from_regex(pattern))

    def choice(self, choices: Sequence[str]) -> Compiled:
        """An answer that is one of `choices`."""
        return self._compile("choice", f"start: {' | '.join(map(_quoted, choices))}")

    def lark(self, grammar: str) -> Compiled:
        """An answer of a grammar in llguidance's dialect of Lark; its first rule is `start`."""
        return self._compile("grammar", llguidance.LLMatcher.grammar_from_lark(grammar))

    def tool_calls(self, tools: Sequence[Mapping[str, Any]], *, several: bool) -> Compiled:
        """An answer that is one call, or several, of `tools` (as the template takes them)."""
        return self._compile("schema of the tools", tool_grammar(tools, several=several))

    def _compile(self, what: str, grammar: str) -> Compiled:
        matcher = llguidance.LLMatcher(self.load(), grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"the {what} cannot be enforced: {matcher.get_error().strip()}")
        end_tokens = sorted(self._tokenizer.stop_token_ids)

        def make(starts_after: int | None) -> GrammarConstraint:
            return GrammarConstraint(matcher.deep_copy(), self._tokenizer.size, end_tokens, starts_after)

        return make

    def load(self) -> llguidance.LLTokenizer:
        """Read the vocabulary now, so that the first grammar need not wait for it."""
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = llguidance.LLTokenizer(
                    self._tokenizer.to_json(),
                    n_vocab=self._tokenizer.size,
                    eos_token=sorted(self._tokenizer.stop_token_ids),
                )
            return self._vocabulary


def tool_grammar(tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """The Lark grammar of calls in the format of tool_calls.py: required parameters must come, the order is fixed."""
    rules = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties") or {}
        required = parameters.get("required") or []
        if not all(isinstance(part, Mapping) for part in (parameters, properties)):
            raise InvalidRequest(f"tools[{i}]: parameters must be a JSON schema of an object")
        kinds = tool_calls.parameter_kinds(parameters)
        shared = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
        parts = []
        for j, (name, schema) in enumerate(properties.items()):
            rule = f"value_{i}_{j}"
            part = _quoted(f"<parameter={name}>\n") + f" {rule}"
            parts.append(part if name in required else f"({part})?")
            rules.append(_value_rule(rule, kinds[name], schema, shared))
        head = _quoted(f"<function={function.get('name')}>\n")
        rules.append(f"function_{i}: {head} {' '.join(parts)}")
    functions = " | ".join(f"function_{i}" for i in range(len(tools)))
    call = r'call: <tool_call> "\n" function "</function>\n" </tool_call>'
    start = r'start: call ("\n" call)*' if several else "start: call"
    return "\n".join([start, call, f"function: {functions}", *rules])


def _value_rule(rule: str, kind: str, schema: Any, shared: Mapping[str, Any]) -> str:
    """A value, and the tag after it."""
    values = (
        schema.get("enum", [schema["const"]] if "const" in schema else None) if isinstance(schema, Mapping) else None
    )
    if kind == tool_calls.STRING and isinstance(values, list) and values:
        return f'{rule}: ({" | ".join(map(_quoted, values))}) "\\n</parameter>\\n"'
    if kind == tool_calls.JSON:
        return (
            f'{rule}: {rule}_json "\\n</parameter>\\n"\n{rule}_json: %json {json.dumps(_compact({**schema, **shared}))}'
        )
    return f'{rule}: {rule}_text "\\n"\n{rule}_text[suffix="\\n</parameter>"]: /(?s:.*)/'


def _compact(schema: Any) -> Any:
    return {**schema, "x-guidance": COMPACT} if isinstance(schema, Mapping) else schema


def _schema_grammar(schema: Any) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"the JSON schema is a {type(schema).__name__}, not an object")
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT)


def _quoted(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text, ensure_ascii=False)
