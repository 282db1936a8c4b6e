"""How AutoMem takes up new settings: an `export` reaches no container, and `restart` keeps the old environment."""

RESTART = """\
  restart AutoMem so that it sees VECTOR_SIZE and EMBEDDING_MODEL:
    Docker:   set both in AutoMem's .env, then  docker compose up -d --force-recreate flask-api
    systemd:  sudo systemctl restart automem
    Railway:  set both as variables, then  railway up"""
