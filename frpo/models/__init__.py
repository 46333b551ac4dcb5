"""The policy and its adapter, frozen references and scorers, and their import and export."""
