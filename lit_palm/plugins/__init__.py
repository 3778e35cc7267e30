"""Plugins: find, check and report what other distributions add to lit_palm.

A plugin is a class in a distribution of its own, named by an entry point whose name is the name of the class:

    [project.entry-points."lit_palm.objectives"]
    DPO = "lit_palm_dpo:DPO"

Importing the class is its registration, because the CLI finds subclasses by their short name. So a run imports only
what its command line and YAML name (`load_named`), while `lit-palm plugins` imports everything (`plugin_table`). A
plugin that does not import, was written for another interface or clashes with another never stops anything else: it is
named on stderr with its distribution, version and cause, and again in the error of whoever asks for it.
`LIT_PALM_PLUGINS=DPO,GRPO` limits loading to those names; set but empty, it turns every plugin off.
"""

from lit_palm.plugins.checking import check_class, is_plugin
from lit_palm.plugins.loading import explain, load, load_named, plugin_table, unknown_message
from lit_palm.plugins.registry import GROUPS, Plugin, PluginError, discover
from lit_palm.plugins.report import argument_names, format_table, main

__all__ = [
    "GROUPS",
    "Plugin",
    "PluginError",
    "argument_names",
    "check_class",
    "discover",
    "explain",
    "format_table",
    "is_plugin",
    "load",
    "load_named",
    "main",
    "plugin_table",
    "unknown_message",
]
