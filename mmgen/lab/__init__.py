"""The lab: small experiments with known answers that test `mmgen.flow`, each with figures, bounds and a picture."""
