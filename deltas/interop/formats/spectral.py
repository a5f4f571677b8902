"""FOURIERFT and C3A: changes of weight by their spectrum, and by circulant blocks."""

from __future__ import annotations

from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.fields import COMMON, LAYERS, TARGETS, Field
from deltacontrol.deltas.interop.format import Slot
from deltacontrol.deltas.interop.modules import FLAG, NAMES, ModuleFormat, biases
from deltacontrol.deltas.methods.c3a import C3A
from deltacontrol.deltas.methods.fourierft import FourierFT


class FourierFormat(ModuleFormat):
    """The entries of the spectrum (n,); their places follow from the seed."""

    peft_type = "FOURIERFT"
    fields = {
        **NAMES,
        "n_frequency": Field(1000, "a positive integer"),
        "scaling": Field(150.0, "a number"),
        "random_loc_seed": Field(777, "an integer"),
        "fan_in_fan_out": FLAG,
        "bias": biases("fourier_only", "fourierft_only"),
        "n_frequency_pattern": Field({}, "an object of positive integers"),
        "init_weights": FLAG,
    }
    writes = (FourierFT,)
    bias_word = "fourier_only"
    kind = FourierFT
    same = {"scaling": "scaling", "random_loc_seed": "seed"}
    patterned = {"n_frequency": ("n_frequency_pattern", "num_frequencies")}
    dotted = True

    def slots(self, delta: FourierFT, site: Site) -> list[Slot]:
        """The entries."""
        return [self.slot(site, "fourierft_spectrum", "c", delta.num_frequencies)]


class C3aFormat(ModuleFormat):
    """The kernels (out/b, in/b, b)."""

    peft_type = "C3A"
    fields = {
        **COMMON,
        "target_modules": TARGETS["target_modules"],
        **LAYERS,
        "block_size": Field(256, "a positive integer"),
        "block_size_pattern": Field({}, "an object of positive integers"),
        "bias": biases("c3a_only"),
        "init_weights": Field("xavier_uniform"),
    }
    writes = (C3A,)
    bias_word = "c3a_only"
    kind = C3A
    patterned = {"block_size": ("block_size_pattern", "block_size")}
    dotted = True
    linear_only = True

    def slots(self, delta: C3A, site: Site) -> list[Slot]:
        """The kernels."""
        size = delta.block_size
        rows, columns = site.out_features // size, site.in_features // size
        return [self.slot(site, "c3a_kernel", "w", rows, columns, size)]


FORMATS = (FourierFormat(), C3aFormat())
