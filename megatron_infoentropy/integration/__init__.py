"""The loss inside Megatron-Core, through doors that Megatron has.

Two doors. In our trainer (`megatron_infoentropy.pretrain`) the loss enters through the output
processor that `GPTModel.forward` takes; HybridModel's loss makes room for it while its forward
runs. In someone else's, `use_infoentropy_loss(model)` binds the model's own
`compute_language_model_loss`.
"""

from megatron_infoentropy.integration.dropin import BoundLoss, bound_loss, use_infoentropy_loss

__all__ = ["BoundLoss", "bound_loss", "use_infoentropy_loss"]
