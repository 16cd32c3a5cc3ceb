"""The tiny model with words to it, served by the real model server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny import VOCABULARY, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sia_events.local_model import weights

NAME = "tiny"
MODEL = f"local/{NAME}"
WORDS = [f"w{at}" for at in range(VOCABULARY - 4)]
END = VOCABULARY - 1
TEMPLATE = (
    "{% for message in messages %}user {{ message['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_home(home: Path) -> Path:
    """A home whose embedded model is the tiny one. Returns the model's folder."""
    folder = make_model(home / "models" / weights.MODEL)
    words = {word: at for at, word in enumerate(["user", "assistant", "end", *WORDS, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder


@contextmanager
def served(home: Path, *where: str) -> Iterator[dict[str, Any]]:
    """The model server of a home until the block ends; its ready line."""
    command = [sys.executable, "-m", "sia_events.local_model.server", "--home", str(home), "--die-with-parent", *where]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert child.stdin and child.stdout
    try:
        yield json.loads(child.stdout.readline())
    finally:
        child.stdin.close()
        child.wait(20)
        child.stdout.close()
