"""The operations of the encoder that are worth a kernel of their own. `reference` is the truth: plain torch; `dispatch`
chooses what runs."""
