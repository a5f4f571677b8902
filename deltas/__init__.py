"""Delta methods as controls on a frozen Transformer.

    from deltas import LoRA, attach
    controlled = attach(model, LoRA(rank=8))   # the base is frozen, the controls are trainable
    controlled.detach()                        # the base again, bit for bit

A delta is a configuration (a frozen dataclass); ``attach`` builds its controllers at the sites that
it targets. ``deltas.dynamics`` shows the same object to theory as a discrete dynamical system.

Feedback laws, which look at each example's states at inference, are another type:
``attach_feedback`` of ``deltas.feedback``, ``calibrate`` of ``deltas.calibration``,
``steer`` of ``deltas.steering``.
"""

from deltas.base import Delta
from deltas.methods.adalora import AdaLoRA
from deltas.methods.adapterdrop import AdapterDrop
from deltas.methods.attention_control import AttentionControl
from deltas.methods.bitfit import BitFit
from deltas.methods.compacter import Compacter
from deltas.methods.diff_pruning import DiffPruning
from deltas.methods.dora import DoRA
from deltas.methods.fisher_mask import FisherMask
from deltas.methods.full import FullFineTuning
from deltas.methods.head import HeadTuning
from deltas.methods.houlsby import HoulsbyAdapter
from deltas.methods.ia3 import IA3
from deltas.methods.intrinsic_prompt import IntrinsicPrompt
from deltas.methods.ladder import LadderSideTuning
from deltas.methods.last_layers import LastLayers
from deltas.methods.layer_norm import LayerNormTuning
from deltas.methods.loha import LoHa
from deltas.methods.lokr import LoKr
from deltas.methods.lora import LoRA
from deltas.methods.lottery_ticket import LotteryTicket
from deltas.methods.low_rank_adapter import LowRankAdapter
from deltas.methods.mam import MixAndMatch
from deltas.methods.mixture_of_control import MixtureOfControl
from deltas.methods.p_tuning import PTuning
from deltas.methods.parallel import ParallelAdapter, StateBasedTuning
from deltas.methods.pfeiffer import PfeifferAdapter
from deltas.methods.prefix import PrefixTuning
from deltas.methods.prompt import PromptTuning
from deltas.methods.random_mask import RandomMask
from deltas.methods.said import StructuredSubspace
from deltas.methods.selected_modules import SelectedModules
from deltas.methods.subspace import Subspace
from deltas.methods.unipelt import UniPELT
from deltas.methods.vera import VeRA
from deltas.model import DeltaModel, attach
from deltas.registry import available, from_dict, parse
from deltas.stack import DeltaStack, attach_many

__all__ = [
    "AdaLoRA",
    "AdapterDrop",
    "AttentionControl",
    "BitFit",
    "Compacter",
    "Delta",
    "DeltaModel",
    "DeltaStack",
    "DiffPruning",
    "DoRA",
    "FisherMask",
    "FullFineTuning",
    "HeadTuning",
    "HoulsbyAdapter",
    "IA3",
    "IntrinsicPrompt",
    "LadderSideTuning",
    "LastLayers",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LotteryTicket",
    "LowRankAdapter",
    "MixAndMatch",
    "MixtureOfControl",
    "PTuning",
    "ParallelAdapter",
    "PfeifferAdapter",
    "PrefixTuning",
    "PromptTuning",
    "RandomMask",
    "SelectedModules",
    "StateBasedTuning",
    "StructuredSubspace",
    "Subspace",
    "UniPELT",
    "VeRA",
    "attach",
    "attach_many",
    "available",
    "from_dict",
    "parse",
]
