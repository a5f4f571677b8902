"""Delta methods as controls on a frozen Transformer.

    from deltacontrol.deltas import LoRA, attach
    controlled = attach(model, LoRA(rank=8))   # the base is frozen, the controls are trainable
    controlled.detach()                        # the base again, bit for bit

A delta is a configuration (a frozen dataclass); ``attach`` builds its controllers at the sites that
it targets. ``deltacontrol.deltas.dynamics.transformer`` shows the same object to theory as a
discrete dynamical system.

Feedback laws, which look at each example's states at inference, are another type:
``attach_feedback`` of ``deltacontrol.deltas.feedback.laws``, ``calibrate`` of
``deltacontrol.deltas.feedback.calibration``, ``steer`` of
``deltacontrol.deltas.feedback.steering``.
"""

from deltacontrol.deltas.attaching import attach
from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.ensemble.serving import Server, serve
from deltacontrol.deltas.ensemble.stack import DeltaStack, attach_many
from deltacontrol.deltas.loading import load, save
from deltacontrol.deltas.methods.adalora import AdaLoRA
from deltacontrol.deltas.methods.adapterdrop import AdapterDrop
from deltacontrol.deltas.methods.attention_control import AttentionControl
from deltacontrol.deltas.methods.bitfit import BitFit
from deltacontrol.deltas.methods.boft import BOFT
from deltacontrol.deltas.methods.c3a import C3A
from deltacontrol.deltas.methods.compacter import Compacter
from deltacontrol.deltas.methods.delora import DeLoRA
from deltacontrol.deltas.methods.diff_pruning import DiffPruning
from deltacontrol.deltas.methods.dora import DoRA
from deltacontrol.deltas.methods.fisher_mask import FisherMask
from deltacontrol.deltas.methods.fourierft import FourierFT
from deltacontrol.deltas.methods.full import FullFineTuning
from deltacontrol.deltas.methods.gralora import GraLoRA
from deltacontrol.deltas.methods.head import HeadTuning
from deltacontrol.deltas.methods.hira import HiRA
from deltacontrol.deltas.methods.houlsby import HoulsbyAdapter
from deltacontrol.deltas.methods.hra import HRA
from deltacontrol.deltas.methods.ia3 import IA3
from deltacontrol.deltas.methods.intrinsic_prompt import IntrinsicPrompt
from deltacontrol.deltas.methods.ladder import LadderSideTuning
from deltacontrol.deltas.methods.last_layers import LastLayers
from deltacontrol.deltas.methods.layer_norm import LayerNormTuning
from deltacontrol.deltas.methods.loha import LoHa
from deltacontrol.deltas.methods.lokr import LoKr
from deltacontrol.deltas.methods.lora import LoRA
from deltacontrol.deltas.methods.loreft import LoReFT
from deltacontrol.deltas.methods.lottery_ticket import LotteryTicket
from deltacontrol.deltas.methods.low_rank_adapter import LowRankAdapter
from deltacontrol.deltas.methods.mam import MixAndMatch
from deltacontrol.deltas.methods.miss import MiSS
from deltacontrol.deltas.methods.mixture_of_control import MixtureOfControl
from deltacontrol.deltas.methods.oft import OFT
from deltacontrol.deltas.methods.p_tuning import PTuning
from deltacontrol.deltas.methods.parallel import ParallelAdapter, StateBasedTuning
from deltacontrol.deltas.methods.pfeiffer import PfeifferAdapter
from deltacontrol.deltas.methods.prefix import PrefixTuning
from deltacontrol.deltas.methods.prompt import PromptTuning
from deltacontrol.deltas.methods.randlora import RandLoRA
from deltacontrol.deltas.methods.random_mask import RandomMask
from deltacontrol.deltas.methods.road import RoAd
from deltacontrol.deltas.methods.said import StructuredSubspace
from deltacontrol.deltas.methods.selected_modules import SelectedModules
from deltacontrol.deltas.methods.subspace import Subspace
from deltacontrol.deltas.methods.trainable_tokens import TrainableTokens
from deltacontrol.deltas.methods.unipelt import UniPELT
from deltacontrol.deltas.methods.vblora import VBLoRA
from deltacontrol.deltas.methods.vera import VeRA
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.deltas.registry import available, from_dict, parse

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "OFT",
    "AdaLoRA",
    "AdapterDrop",
    "AttentionControl",
    "BitFit",
    "Compacter",
    "DeLoRA",
    "Delta",
    "DeltaModel",
    "DeltaStack",
    "DiffPruning",
    "DoRA",
    "FisherMask",
    "FourierFT",
    "FullFineTuning",
    "GraLoRA",
    "HeadTuning",
    "HiRA",
    "HoulsbyAdapter",
    "IntrinsicPrompt",
    "LadderSideTuning",
    "LastLayers",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "LotteryTicket",
    "LowRankAdapter",
    "MiSS",
    "MixAndMatch",
    "MixtureOfControl",
    "PTuning",
    "ParallelAdapter",
    "PfeifferAdapter",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "RandomMask",
    "RoAd",
    "SelectedModules",
    "Server",
    "StateBasedTuning",
    "StructuredSubspace",
    "Subspace",
    "TrainableTokens",
    "UniPELT",
    "VBLoRA",
    "VeRA",
    "attach",
    "attach_many",
    "available",
    "from_dict",
    "load",
    "parse",
    "save",
    "serve",
]
