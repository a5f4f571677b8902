"""Records → table → figure. Never trains, never imports torch.

Each figure is one file of this folder that defines `STUDY`; see `deltacontrol.paper_figures.base`
for what else it defines, and `deltacontrol.paper_figures.command` for `deltacontrol figures`.
"""
