"""The lab: small experiments with known answers that prove the flow toolbox, each with its figures and a picture."""
