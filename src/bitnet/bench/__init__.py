"""How fast a model runs here, against what this machine's memory could give."""
