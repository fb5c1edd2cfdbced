#!/usr/bin/env node
// `npm run bench`: everything that is promised about speed, measured by one command, with the peer in the same run.
//
//   cpu        the software CPU against QEMU TCG: same kernel, same root file system (tier dev), same work, in turn
//   api        what commands, files and output cost on a live sandbox
//   kvm        our machine against QEMU's use of KVM, where KVM works: boot, restore, work, exits (kvm.mjs)
//   snapshots  create, first output, createSnapshot, sizes, memory and CPU of idle copies, through the public API
//   capture    what a snapshot costs: the pause that a process in the guest sees, bytes on disk, 50 copies at once
//   life       pause, resume, fork, and requests to servers in a sandbox
//
// node bench/run.mjs [cpu|kvm|snapshots|capture|life|api] [--rounds N]. Absolute times depend on the host and its load: quote ratios.

import { spawn } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs'
import http from 'node:http'
import { createRequire } from 'node:module'
import { cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { kvmBench } from './kvm.mjs'
import { bootQemu, haveQemu } from '../scripts/guest/qemu.mjs'
import { kernelPaths, rootfsPaths } from '../scripts/guest/paths.mjs'
import { heading, main, root, run, ScriptError } from '../scripts/progress.mjs'
import { setup } from '../scripts/setup.mjs'
import { apiBench } from './api.mjs'
import { captureBench } from './capture.mjs'

// Written without double quotes: it travels on a kernel command line.
const WORK = {
  'python3 start, first': `python3 -c 'print(1)'`,
  'python3 start, second': `python3 -c 'print(1)'`,
  '1000 x fork+exec /bin/true in sh': `sh -c 'i=0; while [ $i -lt 1000 ]; do /bin/true; i=$((i+1)); done'`,
  'python loop, 3 M rounds': `python3 -c 'sum(i*i for i in range(3000000))'`,
  'gcc -O2 of 40 functions': `for i in {1..40}; do echo int f$i'(int x){int s=0;for(int i=0;i<x;i++)s+=i*x%'$((i+2))';return s;}'; done > /tmp/a.c; gcc -O2 -c /tmp/a.c -o /tmp/a.o`,
}

const SCRIPT = [
  ...Object.values(WORK).flatMap((work, i) => [`echo @@begin${i}`, work, `echo @@end${i}`]),
  'echo @@done',
].join('; ')

const BACKENDS = { soft: 'software CPU', kvm: 'KVM' }

const median = (values) => quantile(values, 0.5)
function quantile(values, q) {
  const sorted = [...values].sort((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))]
}
const ms = (v) => `${v.toFixed(1)} ms`
const s = (v) => `${v.toFixed(2)} s`

/** Seconds of each piece of work, from the time its marks came over the console. */
function intervals(lines) {
  const at = new Map(lines.map(({ text, seconds }) => [text, seconds]))
  if (!at.has('@@done')) throw new ScriptError(`The work did not finish:\n${lines.map((l) => l.text).join('\n')}`)
  return Object.keys(WORK).map((_, i) => at.get(`@@end${i}`) - at.get(`@@begin${i}`))
}

/** Boots our own machine with the `boot` tool and returns its console lines and total seconds. */
function bootOurs(tool, kernel, disk, init) {
  return new Promise((done, fail) => {
    const args = ['--kernel', kernel, '--rootfs', disk, '--params', 'quiet', '--seconds', '600', '--init', init]
    const child = spawn(tool, args, { stdio: ['ignore', 'pipe', 'pipe'] })
    let out = ''
    let err = ''
    child.stdout.on('data', (data) => (out += data))
    child.stderr.on('data', (data) => (err += data))
    child.on('error', fail)
    child.on('close', () => {
      const lines = out.split('\n').map((line) => {
        const [, seconds, text] = /^\s*([\d.]+) (.*?)\r?$/.exec(line) ?? []
        return { text, seconds: Number(seconds) }
      })
      const seconds = Number(/^wall ([\d.]+) s/m.exec(err)?.[1])
      const instructions = Number(/, (\d+) instructions/.exec(err)?.[1])
      done({ lines, seconds, instructions })
    })
  })
}

async function cpuBench(rounds) {
  heading('\n== The software CPU against QEMU TCG (-cpu max, one vCPU, 512 MiB, ASLR on)')
  if (!haveQemu()) throw new ScriptError('QEMU is missing. Run: apt-get install -y --no-install-recommends qemu-system-x86')
  await run(process.execPath, ['scripts/guest/build.mjs', 'rootfs', '--tier', 'dev'], { inherit: true })
  await run('cargo', ['build', '--release', '--locked', '--example', 'boot'], { inherit: true })
  const kernel = kernelPaths().vmlinux
  const disk = rootfsPaths('dev').image
  const tool = join(root, 'target', 'release', 'examples', 'boot')
  const names = ['kernel boot to the end of init (/bin/true)', ...Object.keys(WORK)]
  const ours = names.map(() => [])
  const theirs = names.map(() => [])
  const instructions = []
  for (let round = 0; round < rounds; round++) {
    process.stdout.write(`  round ${round + 1} of ${rounds}: ours`)
    const boot = await bootOurs(tool, kernel, disk, '/bin/true')
    const work = await bootOurs(tool, kernel, disk, `/bin/bash -- -c "mount -t proc proc /proc; ${SCRIPT}"`)
    instructions.push(boot.instructions)
    ;[boot.seconds, ...intervals(work.lines)].forEach((v, i) => ours[i].push(v))
    process.stdout.write(', QEMU')
    const qemuBoot = await bootQemu({ kernel, disk, script: '', append: 'init=/bin/true' })
    const qemuWork = await bootQemu({ kernel, disk, script: SCRIPT })
    ;[qemuBoot.seconds, ...intervals(qemuWork.lines)].forEach((v, i) => theirs[i].push(v))
    process.stdout.write('\n')
  }
  heading(`${'median of ' + rounds + ' rounds in turn'.padEnd(30)}`.padEnd(46) + 'Amberbox      QEMU     ratio (pair by pair)')
  names.forEach((name, i) => {
    const ratios = ours[i].map((v, k) => v / theirs[i][k])
    const range = `${median(ratios).toFixed(2)} (${Math.min(...ratios).toFixed(2)}-${Math.max(...ratios).toFixed(2)})`
    heading(`${name.padEnd(44)} ${s(median(ours[i])).padStart(9)} ${s(median(theirs[i])).padStart(9)}     ${range}`)
  })
  heading(`instructions of our boot: ${(median(instructions) / 1e6).toFixed(1)} M (with the wait for the LAPIC timer's calibration)`)
}

const pss = () => Number(/^Pss:\s+(\d+)/m.exec(readFileSync('/proc/self/smaps_rollup', 'utf8'))[1]) * 1024
const sleep = (t) => new Promise((done) => setTimeout(done, t))

/** Bytes on disk below a directory, each inode once. */
function diskUsage(dir) {
  const seen = new Set()
  let bytes = 0
  for (const entry of readdirSync(dir, { recursive: true, withFileTypes: true })) {
    if (!entry.isFile()) continue
    const { ino, blocks } = statSync(join(entry.parentPath, entry.name))
    if (!seen.has(ino)) bytes += blocks * 512
    seen.add(ino)
  }
  return bytes
}

async function snapshotBench() {
  const home = mkdtempSync(join(tmpdir(), 'amberbox-bench-'))
  process.env.AMBERBOX_HOME = home
  const { Sandbox } = await import('../index.mjs')
  const show = (name, value) => heading(`${name.padEnd(58)} ${value}`)
  const distribution = (values) => `p50 ${ms(median(values))}, p95 ${ms(quantile(values, 0.95))} (n=${values.length})`
  const timed = async (body) => {
    const began = performance.now()
    const result = await body()
    return [performance.now() - began, result]
  }
  try {
    const [first, sandbox] = await timed(() => Sandbox.create())
    show('first Sandbox.create() of the process and the store', ms(first))
    const [echoFirst] = await timed(() => sandbox.commands.run('echo hi'))
    show('its first echo', ms(echoFirst))

    const before = diskUsage(home)
    const [took, snapshot] = await timed(() => sandbox.createSnapshot())
    show('createSnapshot() of a fresh sandbox', `${ms(took)}, ${((diskUsage(home) - before) / 1e6).toFixed(2)} MB on disk`)
    const [again] = await timed(() => sandbox.createSnapshot())
    show('createSnapshot() again', ms(again))

    const created = []
    const echoed = []
    for (let i = 0; i < 30; i++) {
      const began = performance.now()
      const copy = await Sandbox.create(snapshot.snapshotId)
      created.push(performance.now() - began)
      let heard
      await copy.commands.run('echo hi', { onStdout: () => (heard ??= performance.now() - began) })
      echoed.push(heard)
      await copy.kill()
    }
    show('Sandbox.create(snapshot) resolved', distribution(created))
    show('Sandbox.create(snapshot) to the first byte of echo', distribution(echoed))

    const live = []
    for (let i = 0; i < 30; i++) live.push((await timed(() => sandbox.commands.run('true')))[0])
    show("commands.run('true') in a live sandbox", distribution(live))

    const N = 20
    const warm = await Sandbox.create(snapshot.snapshotId)
    const base = pss()
    const [together, copies] = await timed(() =>
      Promise.all(Array.from({ length: N }, () => Sandbox.create(snapshot.snapshotId))),
    )
    show(`${N} copies created at once`, ms(together))
    show('memory (PSS) of an idle copy beyond what all share', `${((pss() - base) / N / 2 ** 20).toFixed(1)} MiB`)
    const [all] = await timed(() => Promise.all(copies.map((copy) => copy.commands.run('echo hi'))))
    show(`echo in ${N} copies at once`, ms(all))
    show('memory (PSS) of a copy after its echo', `${((pss() - base) / N / 2 ** 20).toFixed(1)} MiB`)
    await sleep(2000)
    const usage = process.cpuUsage()
    await sleep(5000)
    const { user, system } = process.cpuUsage(usage)
    show(`CPU of ${N + 2} idle sandboxes`, `${((user + system) / 5e6 * 100).toFixed(2)} % of one core`)
    await Promise.all([sandbox, warm, ...copies].map((each) => each.kill()))
    await Sandbox.deleteSnapshot(snapshot.snapshotId)
  } finally {
    rmSync(home, { recursive: true, force: true })
  }
}

/** Answers each request of a keep-alive connection with a few bytes; the client times such requests in the guest itself. */
const SERVER = `
import socket
s = socket.create_server(('127.0.0.1', 8000))
while True:
    c, _ = s.accept()
    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while c.recv(65536): c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok')
`
const CLIENT = `
import http.client, time
c = http.client.HTTPConnection('127.0.0.1', 8000)
times = []
for i in range(300):
    began = time.perf_counter()
    c.request('GET', '/'); c.getresponse().read()
    times.append((time.perf_counter() - began) * 1000)
print(sorted(times)[150])
`

/** Pause, resume, fork, and ports. */
async function lifeBench() {
  const home = mkdtempSync(join(tmpdir(), 'amberbox-bench-'))
  process.env.AMBERBOX_HOME = home
  const { Sandbox } = await import('../index.mjs')
  const show = (name, value) => heading(`${name.padEnd(58)} ${value}`)
  const distribution = (values) => `p50 ${ms(median(values))}, p95 ${ms(quantile(values, 0.95))} (n=${values.length})`
  const timed = async (body) => {
    const began = performance.now()
    await body()
    return performance.now() - began
  }
  try {
    const sandbox = await Sandbox.create({ timeoutMs: 3_600_000 })
    const rounds = { 'pause()': [], 'connect() to a paused sandbox': [], '  to the first byte of echo': [] }
    for (let i = 0; i < 20; i++) {
      await sandbox.commands.run(`echo ${i} > /tmp/round`)
      rounds['pause()'].push(await timed(() => sandbox.pause()))
      const began = performance.now()
      rounds['connect() to a paused sandbox'].push(await timed(() => sandbox.connect()))
      let heard
      await sandbox.commands.run('echo hi', { onStdout: () => (heard ??= performance.now() - began) })
      rounds['  to the first byte of echo'].push(heard)
    }
    const disk = { "pause({ mode: 'filesystem' })": [], 'connect() that boots': [] }
    for (let i = 0; i < 5; i++) {
      disk["pause({ mode: 'filesystem' })"].push(await timed(() => sandbox.pause({ mode: 'filesystem' })))
      disk['connect() that boots'].push(await timed(() => sandbox.connect()))
    }
    for (const [name, values] of Object.entries({ ...rounds, ...disk })) show(name, distribution(values))
    const forks = []
    for (let i = 0; i < 5; i++) {
      let copies
      forks.push(await timed(async () => (copies = await sandbox.fork({ count: 10 }))))
      await Promise.all(copies.map((copy) => copy.kill()))
    }
    show('fork({ count: 10 })', distribution(forks))

    await sandbox.files.write('/tmp/server.py', SERVER)
    await sandbox.files.write('/tmp/client.py', CLIENT)
    const server = await sandbox.commands.run('exec python3 /tmp/server.py', { background: true, timeoutMs: 0 })
    server.wait().catch(() => {})
    const [, hostname, port] = /^(.*):(\d+)$/.exec(sandbox.getHost(8000))
    const agent = new http.Agent({ keepAlive: true, maxSockets: 1 })
    const get = () =>
      new Promise((done, fail) => {
        http.get({ hostname, port, agent }, (response) => response.resume().on('end', done)).on('error', fail)
      })
    while (await get().then(() => false, () => true)) await sleep(20)
    const trips = []
    for (let i = 0; i < 300; i++) trips.push(await timed(get))
    agent.destroy()
    // The server serves one connection at a time: the one above has ended.
    const own = Number((await sandbox.commands.run('python3 /tmp/client.py')).stdout)
    show('keep-alive HTTP request through getHost', distribution(trips))
    show("the guest's own keep-alive HTTP request", `p50 ${ms(own)}`)
    await sandbox.kill()
  } finally {
    rmSync(home, { recursive: true, force: true })
  }
}

/** Our machine against QEMU's use of the same KVM. */
async function kvmSection(kvm, rounds) {
  heading("\n== KVM: our machine against QEMU's use of it (one vCPU, 512 MiB)")
  if (kvm.verdict !== 'usable') {
    heading(`Not measured here: ${kvm.detail}`)
    heading('Ratios, in a machine that QEMU emulates: npm run test:kvm -- --bench')
    return
  }
  await run('cargo', ['build', '--release', '--locked', '--example', 'boot'], { inherit: true })
  const tool = join(process.env.CARGO_TARGET_DIR ?? join(root, 'target'), 'release', 'examples', 'boot')
  await kvmBench({ tool, kernel: kernelPaths().vmlinux, disk: rootfsPaths().image, rounds, print: heading })
}

await main(async () => {
  process.chdir(root)
  const { values, positionals } = parseArgs({ allowPositionals: true, options: { rounds: { type: 'string', default: '3' } } })
  const wanted = positionals.length > 0 ? positionals : ['cpu', 'kvm', 'snapshots', 'capture', 'life', 'api']
  await setup()
  heading(`\nHost: ${cpus().length} x ${cpus()[0].model}, Node ${process.version}`)
  const { native, places } = createRequire(import.meta.url)('../lib/native')
  const kvm = await native.diagnose(undefined, places().home, { token: 0, timeoutMs: 0 })
  if (wanted.includes('cpu')) await cpuBench(Number(values.rounds))
  if (wanted.includes('kvm')) await kvmSection(kvm, Number(values.rounds))
  // Every backend that works here has its column, whatever the environment says.
  for (const backend of kvm.verdict === 'usable' ? ['kvm', 'soft'] : ['soft']) {
    process.env.AMBERBOX_BACKEND = backend
    if (wanted.includes('snapshots')) {
      heading(`\n== Sandboxes and snapshots, ${BACKENDS[backend]} (512 MiB guest, public API)`)
      await snapshotBench()
    }
    if (wanted.includes('capture')) {
      heading(`\n== What a snapshot costs, ${BACKENDS[backend]} (512 MiB guest, public API)`)
      await captureBench((name, value) => heading(`${name.padEnd(58)} ${value}`))
    }
    if (wanted.includes('life')) {
      heading(`\n== Pause, fork and ports, ${BACKENDS[backend]} (512 MiB guest, public API)`)
      await lifeBench()
    }
    if (wanted.includes('api')) {
      heading(`\n== The API on a live sandbox, ${BACKENDS[backend]} (512 MiB guest)`)
      await apiBench((name, value) => heading(`${name.padEnd(58)} ${value}`))
    }
  }
})
