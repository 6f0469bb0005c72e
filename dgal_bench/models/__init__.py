"""Plain networks, and the thin LightningModules that train them."""
