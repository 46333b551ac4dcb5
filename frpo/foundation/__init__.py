"""What every room stands on: errors, YAML files, redaction of secrets, durable files, the shipped folders."""
