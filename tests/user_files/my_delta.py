"""One number scales the output of every feed-forward layer."""

from dataclasses import dataclass

import torch

from deltacontrol.deltas import Delta


@dataclass(frozen=True)
class Mine(Delta):
    name = "mine"
    category = "reparametrisation"
    law = "h (1 + s)"
    reference = "this file"
    num_parameters_formula = "L"
    default_rate = 0.03
    look = ("my scales", "#882255", "*")

    def build(self, host):
        for site in host.find(("mlp.down",)):
            control = torch.nn.ParameterDict({"s": torch.zeros(1)})
            host.add(site.path, control, site.module.weight)
            host.on_output(site.module, lambda _, h, control=control: h * (1 + control["s"]))

    def num_parameters(self, host):
        return len(host.find(("mlp.down",)))
