"""deepseek_train: the DeepSeek-V3 training system, each part readable in an hour and testable on a laptop."""
