"""Drop-ins, one small file per trainer."""
