"""spp teacher-cache: what the dense model says of the training data, written once, so that it need not run beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spp.cli import console
from spp.cli.options import command
from spp.configs.distillation import TeacherCacheConfig

NAME = "teacher-cache"


@command(TeacherCacheConfig)
def run(config: TeacherCacheConfig) -> None:
    """Write a teacher's highest log-probabilities for every token to learn; spp tune --teacher-cache reads them.

    The data and its options are those of spp tune: a row is found by its tokens. Rows that are held out there do
    no harm here.

    Example: spp teacher-cache MODEL cache --data train.txt --block-length 512
    """
    from spp.files import check_target
    from spp.files.carry import refuse_overlap
    from spp.files.hub import local_directory
    from spp.files.provenance import Provenance
    from spp.report import Table, byte_text
    from spp.training import load_data
    from spp.training.loading import load_model, load_tokenizer
    from spp.training.teacher_cache import write_cache

    device = console.pick_device(config.device)
    check_target(config.output, overwrite=config.overwrite)
    directory = local_directory(config.model, "model")
    refuse_overlap(config.output, Path(directory), "the teacher")
    console.quiet_libraries()
    with console.step(f"asking {config.model}"), console.log():
        tokenizer = load_tokenizer(directory)
        data = load_data(
            config.data_files,
            tokenizer,
            block_length=config.block_length,
            data_format=config.data_format,
            split=config.data_split,
            text_field=config.text_field,
            completions_only=config.completions_only,
            bos=config.bos,
        )
        model = load_model(config.model, config.dtype).to(device)
        options: Any = {"top_k": config.top_k, "batch_size": config.batch_size, "overwrite": config.overwrite}
        found = write_cache(model, tokenizer, data, config.output, **options, progress=True)
    console.answer({**Provenance.here(device, model.dtype).to_dict(), **found.to_dict()})
    columns = ("rows", "tokens", "of each", "outside of them", "size")
    row = (str(found.rows), str(found.tokens), str(found.top_k), f"{found.rest:.2%}", byte_text(found.bytes))
    console.show(Table("teacher cache", columns, (row,)))
    console.wrote(config.output)
