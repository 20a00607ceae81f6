"""``fedloom doctor``: what a site or a coordinator needs, looked at one by one, and what to do."""
