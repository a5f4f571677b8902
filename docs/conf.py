"""Sphinx's settings. Copied beside the sources, so that every path here is relative to them."""

from importlib.metadata import version as _version

project = "deltacontrol"
author = copyright = "deltacontrol authors"
version = release = _version("deltacontrol")

extensions = ["myst_parser", "sphinx_design", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_extra", "_static"]
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
# Headings of notebooks may skip a level; a type in a signature may be the name of two classes.
# Names in texts are full ones, and a wrong one is a warning.
suppress_warnings = ["myst.header", "ref.python"]

# Everything that a reader's browser loads is in the site.
mathjax_path = "mathjax/tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}}

add_module_names = False
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
toc_object_entries = True
toc_object_entries_show_parents = "hide"

pygments_style = "tango"
html_theme = "pydata_sphinx_theme"
html_title = "deltacontrol"
html_context = {"default_mode": "auto"}
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_extra_path = ["_extra"]
html_css_files = ["site.css"]
html_js_files = ["copy.js"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "collapse_navigation": True,
    "navigation_depth": 2,
    "show_toc_level": 2,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
    "back_to_top_button": True,
}
html_sidebars = {
    "index": [],
    "quickstart": [],
    "faq": [],
    "changelog": [],
    "contributing": [],
}
