def trial(work, number):
    raise StopIteration
