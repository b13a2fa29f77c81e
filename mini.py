def prepare(model, writer):
    raise NotImplementedError
