"""What llm_cluster.py is made of: settings, schemas, wires and client below; prompts, registry and steps above."""
