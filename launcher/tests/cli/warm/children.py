# Starts a process in each of the ways that multiprocessing has.
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor


def work(answers, number):
    answers.put((number, os.environ['RANK'], sys.argv[1:], __name__, os.getppid() == int(sys.argv[1])))


def square(number):
    return number * number


if __name__ == '__main__':
    sys.argv[1:] = [str(os.getpid())]
    for method in ('fork', 'spawn', 'forkserver'):
        context = multiprocessing.get_context(method)
        answers = context.Queue()
        process = context.Process(target=work, args=(answers, 7))
        process.start()
        number, rank, argv, name, is_child = answers.get()
        process.join()
        print(method, number, rank, len(argv), name, is_child, process.exitcode)
    with ProcessPoolExecutor(2) as pool:
        print(list(pool.map(square, range(4))))
