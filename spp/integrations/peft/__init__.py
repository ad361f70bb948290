"""SPP as a method of PEFT: importing this module registers it.

    import spp.integrations.peft
    model = get_peft_model(model, spp.integrations.peft.SPPPeftConfig(r=16, task_type="CAUSAL_LM"))

From then on PEFT's own functions know it: several adapters and switching between them, `disable_adapter`,
`merge_and_unload`, `PeftModel.from_pretrained`, `AutoPeftModelForCausalLM`, transformers' `model.load_adapter`, Trainer
and TRL. The directories are those of `spp.save_adapter`: either side reads what the other wrote. The layers compute
with spp's kernels, and a merge stores, bit for bit, what `spp.merge` stores.
"""

from __future__ import annotations

from spp.integrations.peft.method import explained, register, require_peft

require_peft()
with explained():
    register()
    from spp.integrations.peft.config import SPPPeftConfig
    from spp.integrations.peft.experts import SPPPeftExperts
    from spp.integrations.peft.layer import SPPPeftLinear
    from spp.integrations.peft.model import SPPPeftModel

__all__ = ["SPPPeftConfig", "SPPPeftExperts", "SPPPeftLinear", "SPPPeftModel"]
