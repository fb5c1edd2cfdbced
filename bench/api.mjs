// The API on a live sandbox: what a command costs beyond the guest's own work, small files, bulk transfers, many
// small pieces of output. Called by run.mjs.

import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const quantile = (values, q) => [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(q * values.length))]
const distribution = (values) =>
  `p50 ${quantile(values, 0.5).toFixed(1)} ms, p95 ${quantile(values, 0.95).toFixed(1)} ms (n=${values.length})`

async function timed(body) {
  const began = performance.now()
  const result = await body()
  return [performance.now() - began, result]
}

async function repeat(count, body) {
  const times = []
  for (let i = 0; i < count; i++) times.push((await timed(() => body(i)))[0])
  return times
}

/** Runs the rows; `show` prints one. */
export async function apiBench(show) {
  const home = mkdtempSync(join(tmpdir(), 'amberbox-bench-'))
  process.env.AMBERBOX_HOME = home
  const { Sandbox } = await import('../index.mjs')
  try {
    const sandbox = await Sandbox.create({ timeoutMs: 3_600_000 })
    const { commands, files } = sandbox
    await repeat(5, () => commands.run('true'))
    const times = await repeat(50, () => commands.run('true'))
    const rounds = 50
    const inside = await commands.run(
      `s=$(date +%s%N); for i in $(seq ${rounds}); do /bin/bash -l -c true; done; e=$(date +%s%N); echo $((e-s))`,
    )
    const own = Number(inside.stdout) / 1e6 / rounds
    show("commands.run('true')", distribution(times))
    show('... the same inside the guest (fork, exec, login shell)', `${own.toFixed(1)} ms`)
    show('... overhead (p50)', `${(quantile(times, 0.5) - own).toFixed(1)} ms`)

    await files.write('small', 'x'.repeat(100))
    show('files.write, 100 bytes, over a file', distribution(await repeat(50, () => files.write('small', 'y'.repeat(100)))))
    show('files.write, 100 bytes, new files', distribution(await repeat(50, (i) => files.write(`small-${i}`, 'y'.repeat(100)))))
    show('files.read, 100 bytes', distribution(await repeat(50, () => files.read('small'))))
    show('files.getInfo', distribution(await repeat(50, () => files.getInfo('small'))))

    const size = 100e6
    const data = Buffer.alloc(size, 'amberbox ')
    const rate = (ms) => `${(size / ms / 1e3).toFixed(0)} MB/s (${(ms / 1000).toFixed(2)} s)`
    const [up] = await timed(() => files.write('big', data))
    show('upload of 100 MB, new file', rate(up))
    const [over] = await timed(() => files.write('big', data))
    show('upload of 100 MB, over a file', rate(over))
    const [down, back] = await timed(() => files.read('big', { format: 'bytes' }))
    if (Buffer.compare(back, data) !== 0) throw new Error('The file came back different')
    show('download of 100 MB', rate(down))
    const [shm] = await timed(() => files.write('/dev/shm/big', data, { user: 'root' }))
    show('upload of 100 MB into memory (tmpfs)', rate(shm))
    const [fromShm] = await timed(() => files.read('/dev/shm/big', { format: 'bytes' }))
    show('download of 100 MB from memory', rate(fromShm))
    await commands.run('rm -f /dev/shm/big', { user: 'root' })

    let bytes = 0
    const [output] = await timed(() =>
      commands.run('head -c 100000000 /dev/zero', { onStdout: (text) => void (bytes += text.length), timeoutMs: 0 }),
    )
    if (bytes !== size) throw new Error(`Output was lost: ${bytes}`)
    show('output of 100 MB of a command', rate(output))

    // Pieces that are far enough apart not to be gathered: the agent sends each by itself.
    let events = 0
    let seen = 0
    const program = 'i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done'
    const [pieces] = await timed(() =>
      commands.run(program, { onStdout: (text) => void (events++, (seen += text.split('\n').length - 1)), timeoutMs: 0 }),
    )
    if (seen !== 20000) throw new Error(`Lines were lost: ${seen}`)
    show('20 000 lines of a shell loop', `${(seen / pieces).toFixed(1)} k lines/s in ${events} events`)
    await sandbox.kill()
  } finally {
    rmSync(home, { recursive: true, force: true })
  }
}

if (process.argv[1] === import.meta.filename) {
  await apiBench((name, value) => process.stdout.write(`${name.padEnd(58)} ${value}\n`))
}
