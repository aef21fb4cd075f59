"""The training scripts, one experiment each; installed as data under ``mctd_diffusers/_training``.

They are launched by path (``accelerate launch training/train_vae.py ...``) and never imported.
"""
