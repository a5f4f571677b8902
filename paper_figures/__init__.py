"""Records → table → figure. Never trains, never imports torch.

Each figure is one file of this folder that defines `STUDY`; see `paper_figures.base` for what else
it defines, and `paper_figures.command` for `deltacontrol figures`.
"""
