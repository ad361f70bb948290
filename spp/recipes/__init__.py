"""Recipes: the stages of a whole run and their options, as a YAML file; `spp run` carries one out in one directory."""
