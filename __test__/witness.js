'use strict'
/**
 * A process in a sandbox that can testify that it was never interrupted: it holds random memory, open files, a child and
 * a computation in floating point that never rests, and answers questions about them.
 */

const DIR = '/tmp/witness'

const PROGRAM = `
import hashlib, json, os, socket, struct, threading, time
os.chdir('${DIR}')
secret = os.urandom(16).hex()
blob = b''.join(os.urandom(1 << 16) * 16 for _ in range(8))
unlinked = open('unlinked', 'w+')
unlinked.write(secret)
unlinked.flush()
os.unlink('unlinked')
ours, theirs = socket.socketpair()
child = os.fork()
if child == 0:
    while data := theirs.recv(100):
        theirs.send(data[::-1])
    os._exit(0)

# Each step needs every bit of the one before: one wrong register anywhere and the end differs from a computation elsewhere.
x, steps, lock = 0.5, 0, threading.Lock()
newest, backwards = time.monotonic_ns(), 0
def compute():
    global x, steps, newest, backwards
    os.nice(19)
    while True:
        with lock:
            for _ in range(200):
                x = 3.99 * x * (1.0 - x)
            steps += 200
            now = time.monotonic_ns()
            backwards += now < newest
            newest = now
        time.sleep(0.0001)
threading.Thread(target=compute, daemon=True).start()

asked = 0
open('ready', 'w').close()
while True:
    with open('ask') as question:
        word = question.read()
    asked += 1
    ours.send(word.encode())
    echo = ours.recv(100).decode()
    unlinked.seek(0)
    with lock:
        answer = dict(pid=os.getpid(), child=child, secret=secret, digest=hashlib.sha256(blob).hexdigest(),
            unlinked=unlinked.read(), echo=echo, asked=asked, steps=steps, x=struct.pack('<d', x).hex(),
            newest=newest, backwards=backwards)
    with open('answer', 'w') as out:
        json.dump(answer, out)
`

/** What the files of [`plantFiles`] add up to. */
const SUM_FILES = `cd && cat tree/*/* /dev/shm/memory-file | sha256sum | cut -d' ' -f1`

/** Starts the witness and leaves some files; resolves with what must still be true later and elsewhere. */
async function plant(sandbox) {
  await sandbox.files.write(`${DIR}/witness.py`, PROGRAM)
  await sandbox.commands.run(
    `cd ${DIR} && mkfifo ask answer && mkdir -p ~/tree/{a,b,c} && for i in $(seq 60); do echo "$i $RANDOM" > ~/tree/a/$i; done` +
      ` && head -c 2000000 /dev/urandom > ~/tree/b/large && echo $RANDOM > ~/tree/c/x && echo $RANDOM > /dev/shm/memory-file`,
  )
  // Not a child of a command that ends, and without its output.
  await sandbox.commands.run(`cd ${DIR} && setsid python3 witness.py > log 2>&1 < /dev/null &`)
  for (;;) {
    const { stdout } = await sandbox.commands.run(
      `cd ${DIR}; cat log; test -e ready && echo yes || sleep 0.1`,
    )
    if (stdout.endsWith('yes\n')) break
    if (stdout) throw new Error(`The witness failed: ${stdout}`)
  }
  const files = (await sandbox.commands.run(SUM_FILES)).stdout.trim()
  const { backend, cpuCount } = await sandbox.getInfo()
  return { backend, cpuCount, files, answer: await ask(sandbox) }
}

/** Asks the witness; its answer with `x` as a number. */
async function ask(sandbox, word = 'hello') {
  const { stdout } = await sandbox.commands.run(`cd ${DIR} && printf %s '${word}' > ask && cat answer`)
  const answer = JSON.parse(stdout)
  return { ...answer, x: Buffer.from(answer.x, 'hex').readDoubleLE(0) }
}

/** What the witness's computation must have arrived at. */
function computed(steps) {
  let x = 0.5
  for (let i = 0; i < steps; i++) x = 3.99 * x * (1.0 - x)
  return x
}

/** Checks that `sandbox` is where a sandbox was of which [`plant`] or this function said `before`; resolves with what is true now. */
async function examine(sandbox, before) {
  const answer = await ask(sandbox, 'again')
  expect(answer).toMatchObject({
    pid: before.answer.pid,
    child: before.answer.child,
    secret: before.answer.secret,
    digest: before.answer.digest,
    unlinked: before.answer.secret,
    echo: 'niaga',
    asked: before.answer.asked + 1,
    backwards: 0,
  })
  expect(answer.newest).toBeGreaterThan(before.answer.newest)
  expect(answer.steps).toBeGreaterThan(before.answer.steps)
  expect(answer.x).toBe(computed(answer.steps))
  expect((await ask(sandbox)).steps).toBeGreaterThan(answer.steps)
  expect((await sandbox.commands.run(SUM_FILES)).stdout.trim()).toBe(before.files)
  const { backend, cpuCount } = await sandbox.getInfo()
  return { ...before, backend, cpuCount, answer: await ask(sandbox) }
}

module.exports = { plant, examine }
