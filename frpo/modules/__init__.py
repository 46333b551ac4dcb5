"""The LightningModules of policy optimisation and supervised fine-tuning. They conduct; the equations are elsewhere."""
