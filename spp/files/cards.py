"""Model cards that a library generated and nobody has edited: they say nothing that somebody wrote."""

from __future__ import annotations

import re
from pathlib import Path

CARD_NAME = "README.md"  # the hub's model card

_LARGEST = 1 << 16  # bytes of a generated card
_CARD = re.compile(r"\A(?:---\n(?P<fields>.*?)\n---\n)?(?P<body>.*)\Z", re.DOTALL)
_FIELD = re.compile(r"(base_model|library_name|pipeline_tag|tags):.*|[ ]*- .*")  # what PEFT writes into it
_PLACEHOLDER = "[More Information Needed]"
_FEWEST = 30  # placeholders of the hub's template: it has more than 40
_TITLE = "# Model Card for Model ID"
_LINE = re.compile(  # every line of the hub's template, and what PEFT adds
    r"#{2,} [\w ,&\[\]-]+|(<!--[^>]*-->)?|\*\*(BibTeX|APA):\*\*|- PEFT [\w.+-]+"
    r"|(- \*\*[\w ()\[\]-]+:\*\* )?\[More Information Needed\]( <!--[^>]*-->)?"
    r"|The following `bitsandbytes` quantization config was used during training:"
    r"|- (quant_method|_?load_in_[48]bit|llm_int8_\w+|bnb_4bit_\w+): .*"
    r"|Use the code below to get started with the model\."
    r"|Users \(both direct and downstream\) should be made aware of .* for further recommendations\."
    r"|Carbon emissions can be estimated using the \[Machine Learning Impact calculator\].*"
)
_BY_TRAINER = "<!-- This model card has been generated automatically according to the information the Trainer had"
_SECTIONS = ("Model description", "Intended uses & limitations", "Training and evaluation data")
_EMPTY = "\n\n".join(f"## {title}\n\nMore information needed" for title in _SECTIONS)


def is_generated_card(path: Path) -> bool:
    """Whether a file is the card that PEFT or the Trainer of transformers writes, with nothing filled in."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return False
        found = _CARD.match(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    assert found is not None  # every text is one
    fields, body = found["fields"] or "", found["body"]
    if _BY_TRAINER in body:
        return _EMPTY in body
    lines = [line.strip() for line in body.splitlines()]
    return (
        body.count(_PLACEHOLDER) >= _FEWEST
        and next(filter(None, lines)) == _TITLE
        and all(line == _TITLE or _LINE.fullmatch(line) for line in lines)
        and all(_FIELD.fullmatch(line) for line in fields.splitlines())
    )
