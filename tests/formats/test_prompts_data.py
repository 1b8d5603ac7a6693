"""The built-in prompts: well-formed, varied and without duplicates."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

PROMPTS = Path(__file__).resolve().parents[2] / "edge_dtm" / "data" / "prompts.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def _text(row: dict[str, Any]) -> str:
    if "prompt" in row:
        return str(row["prompt"])
    return "\n".join(message["content"] for message in row["messages"])


def test_there_are_enough_short_prompts_of_all_kinds(rows: list[dict[str, Any]]) -> None:
    assert len(rows) >= 96
    assert len({row["kind"] for row in rows}) >= 10
    # The first prompts alone must be varied too, as quick runs take only those.
    assert len({row["kind"] for row in rows[:16]}) >= 8
    assert max(len(_text(row).split()) for row in rows) <= 120
    chats = [row["messages"] for row in rows if "messages" in row]
    assert len(chats) >= 60
    assert len(rows) - len(chats) >= 30
    assert any(messages[0]["role"] == "system" for messages in chats)
    assert any("assistant" in {m["role"] for m in messages} for messages in chats)


def test_ids_and_texts_are_unique(rows: list[dict[str, Any]]) -> None:
    ids = Counter(row["id"] for row in rows)
    texts = Counter(" ".join(_text(row).lower().split()) for row in rows)
    assert [key for key, count in ids.items() if count > 1] == []
    assert [key for key, count in texts.items() if count > 1] == []


def test_schema(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert isinstance(row["id"], str) and row["id"]
        assert isinstance(row["kind"], str) and row["kind"]
        if "prompt" in row:
            assert set(row) == {"id", "kind", "prompt"}, row["id"]
            assert isinstance(row["prompt"], str) and row["prompt"].strip(), row["id"]
            continue
        assert set(row) == {"id", "kind", "messages"}, row["id"]
        messages = row["messages"]
        for message in messages:
            assert set(message) == {"role", "content"}, row["id"]
            assert isinstance(message["content"], str) and message["content"].strip(), row["id"]
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        # Chat templates of many models refuse anything but alternating turns.
        assert turns[::2] == ["user"] * len(turns[::2]), row["id"]
        assert turns[1::2] == ["assistant"] * len(turns[1::2]), row["id"]
        assert turns and turns[-1] == "user", row["id"]
