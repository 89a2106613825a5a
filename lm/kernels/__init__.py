"""How the heavy parts are computed: one package per operation, each with an obvious reference."""
