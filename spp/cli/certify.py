"""spp certify: the certificate of a checkpoint's zeros."""

from __future__ import annotations

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import CertifyConfig

NAME = "certify"


@command(CertifyConfig)
def run(config: CertifyConfig) -> None:
    """Write sparsity.json, the certificate that spp verify checks, into a checkpoint's directory.

    Example: spp certify merged --base pruned
    """
    from spp.certifying.save import certify
    from spp.files.carry import CERTIFICATE_NAME
    from spp.files.recognised import CERTIFICATE
    from spp.report import sparsity_table

    certificate = config.directory / CERTIFICATE_NAME
    console.check_file(certificate, config.overwrite, CERTIFICATE)
    with console.step(f"certifying {config.directory}"):
        report = certify(config.directory, config.base, deep=config.deep)
    console.answer(report.to_dict())
    console.show(sparsity_table(report, every=config.every))
    console.wrote(certificate)
