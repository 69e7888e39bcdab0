"""How the embedded model is made and the model compared with the original: no module of the package imports this."""
