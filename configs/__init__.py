"""The YAML files of every configuration group, installed as ``deepseek_train_configs``."""
