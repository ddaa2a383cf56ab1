"""From the rows of a chat or instruction data set to one text and the stretches of it that are to be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LAYOUTS", "messages_of", "render"]

Message = Mapping[str, str]
Stretch = tuple[int, int]

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Used for tokenizers that bring no chat template."""

LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
"""Columns of chat and instruction data, tried in this order; `instruction` may come with `input`."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def messages_of(row: Mapping[str, Any], layout: Sequence[str]) -> list[dict[str, str]]:
    """The turns of one row as `{"role", "content"}`.

    Raises:
        ValueError: the row holds no such turns.
    """
    if len(layout) == 1:
        turns = row[layout[0]]
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise ValueError(f"column {layout[0]!r} must hold a list of turns, got {turns!r:.60}")
        return [_turn(turn) for turn in turns]
    question, answer = row[layout[0]], row[layout[1]]
    extra = row.get("input") if layout[0] == "instruction" else None
    content = f"{question}\n\n{extra}" if extra else str(question)
    return [{"role": "user", "content": content}, {"role": "assistant", "content": str(answer)}]


def render(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[Stretch]]:
    """The whole conversation as text, and the characters of it that the assistant has to say.

    The stretch of an answer starts after the prompt for it and ends with its end-of-turn mark, so that the model
    learns to stop.

    Args:
        tokenizer: brings the chat template, if it has one.
        messages: the turns.

    Raises:
        ValueError: the template rewrites earlier turns, so that an answer cannot be located.
    """
    template = tokenizer.chat_template or PLAIN_TEMPLATE

    def text_of(turns: Sequence[Message], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            list(turns), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    whole = text_of(messages)
    stretches = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text_of(messages[:number], prompt=True), text_of(messages[: number + 1])
        if not after.startswith(before) or not whole.startswith(after):
            raise ValueError("the chat template rewrites earlier turns; give one turn per row")
        stretches.append((len(before), len(after)))
    return whole, stretches


def _turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a turn must have a role and a content, got {turn!r:.60}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role is None or content is None:
        raise ValueError(f"a turn must have a role and a content, got keys {', '.join(map(str, turn))}")
    return {"role": _ROLES.get(str(role), str(role)), "content": str(content)}
