#!/usr/bin/env node
// `npm run test:kvm`: the KVM backend's tests on any host. An outer guest with emulated AMD-V runs the Jest suite with
// AMBERBOX_BACKEND=kvm; snapshots go in from this host's software CPU and come back to it. Needs no usable /dev/kvm.
//
//   --only TEXT   only the steps in the outer guest whose name contains TEXT (and the set-up)
//   --all         every Jest file in which the backend matters, for which the emulation takes half an hour
//   --bench       the benchmark against QEMU's use of KVM instead of the tests
//   --run CMD     one step of your own instead (bash, in the project's directory of the outer guest)
//   --keep        keep the directory with results, stores and the payload, and say where it is

import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { cacheRoot, kernelPaths, rootfsPaths } from '../guest/paths.mjs'
import { needPackages } from '../guest/steps.mjs'
import { heading, main, npmPackages, root, run, ScriptError, seconds, step, tool } from '../progress.mjs'
import { setup } from '../setup.mjs'
import { buildRigKernel } from './kernel.mjs'
import { outcome, PACKAGES, runOuter } from './outer.mjs'
import { makePayload, qemuFiles } from './payload.mjs'

/** Jest in the outer guest: one file after the other, a line per test, the report in the host's directory. */
function jest(report, files) {
  return (
    'node --experimental-vm-modules --no-warnings node_modules/jest/bin/jest.js --runInBand --ci' +
    ` --reporters=/mnt/payload/rig/reporter.cjs --json --outputFile=/mnt/host/${report}.json ${files}`
  )
}

/** The Rust tests that use KVM where it works. */
const UNIT_TESTS = 'machine::kvm machine::probe machine::tests'

/** The files of the suite in which the backend matters; in the others (git, watchers, the store, types) it does not. */
const ALL = ['commands', 'errors', 'files', 'lifecycle', 'pause', 'ports', 'process', 'snapshots']

/** Those that run on every change: the emulation is some fifty times slower than a host with KVM. */
const SUITE = ['commands', 'lifecycle', 'process']

/** Outer guests that may die before the run fails. */
const ATTEMPTS = 3

/** What runs in the outer guest; limits are some four times what it takes on free cores. */
const planOf = (files) => [
  {
    name: 'what the machine is',
    seconds: 60,
    command: 'uname -a; ls -l /dev/kvm; cat /sys/devices/system/clocksource/clocksource0/current_clocksource',
  },
  {
    name: 'doctor',
    seconds: 90,
    command: 'AMBERBOX_BACKEND= node cli/main.js doctor; node cli/main.js doctor',
  },
  {
    name: 'unit tests',
    seconds: 300,
    command: `/mnt/payload/bin/unit-tests --test-threads=1 ${UNIT_TESTS} 2>&1 | tee /mnt/host/unit-tests; exit \${PIPESTATUS[0]}`,
  },
  {
    name: 'portability',
    seconds: 400,
    command:
      'AMBERBOX_PORTABLE_FROM=/mnt/payload/from-host AMBERBOX_PORTABLE_TO=$TMPDIR/to-host ' +
      `${jest('portability', 'portability')} && cp -r $TMPDIR/to-host /mnt/host/to-host`,
  },
  {
    name: 'sandboxes',
    seconds: 240 * files.length,
    command: jest('sandboxes', files.map((file) => `/${file}.test`).join(' ')),
  },
]

const BENCH = {
  name: 'bench',
  seconds: 1500,
  command:
    'mount -t debugfs debugfs /sys/kernel/debug; node bench/kvm.mjs --tool /mnt/payload/bin/boot' +
    ' --kernel /mnt/payload/bench/vmlinux --disk /mnt/payload/bench/rootfs.ext4 --json /mnt/host/rows',
}

/** What the benchmark needs in the payload beyond the package. */
async function benchFiles() {
  await run('cargo', ['build', '--release', '--locked', '--example', 'boot'], { inherit: true })
  const target = process.env.CARGO_TARGET_DIR ?? join(root, 'target')
  return {
    ...(await qemuFiles()),
    'bin/boot': join(target, 'release', 'examples', 'boot'),
    'bench/vmlinux': kernelPaths().vmlinux,
    'bench/rootfs.ext4': rootfsPaths().image,
    'project/bench': join(root, 'bench'),
    'project/scripts': join(root, 'scripts'),
    // What the cached guest is found by.
    'project/guest': join(root, 'guest'),
  }
}

/** The Rust tests as a program. Built as `cargo test --workspace` does, which continuous integration has run before. */
async function unitTests(work) {
  let program
  await step('unit tests (cargo, debug)', async (note) => {
    const args = ['test', '--workspace', '--locked', '--no-run', '--message-format=json-render-diagnostics']
    await run('cargo', args, {
      onLine(line) {
        if (!line.startsWith('{')) return note(line.trim())
        const { reason, profile, target, executable } = JSON.parse(line)
        const library = target?.name === 'amberbox' && target.kind.some((kind) => kind.endsWith('lib'))
        if (reason === 'compiler-artifact' && profile.test && library) program = executable
      },
    })
    if (!program) throw new ScriptError('cargo built no tests of the package amberbox')
    // Debugging information is nine tenths of it.
    await run('strip', ['--strip-debug', '-o', join(work, 'unit-tests'), program])
  })
  return { 'bin/unit-tests': join(work, 'unit-tests') }
}

/** Runs the portability tests on this host's software CPU. */
async function portability(name, env) {
  await step(name, async () => {
    await run(
      process.execPath,
      ['--experimental-vm-modules', '--no-warnings', tool('jest', 'bin', 'jest.js'), 'portability'],
      { env: { ...process.env, AMBERBOX_BACKEND: 'soft', ...env } },
    )
  })
}

/** A directory for this run. Those of runs that were killed are removed. */
function workDirectory() {
  const parent = join(cacheRoot(), 'rig')
  mkdirSync(parent, { recursive: true })
  for (const name of readdirSync(parent)) {
    const pid = /^run-(\d+)-/.exec(name)?.[1]
    if (pid && !existsSync(`/proc/${pid}`)) rmSync(join(parent, name), { recursive: true, force: true })
  }
  return { work: mkdtempSync(join(parent, `run-${process.pid}-`)), log: join(parent, 'console.log') }
}

/** Tests passed and failed according to the reports in a directory. */
function totals(directory) {
  const sum = { passed: 0, failed: 0 }
  const unit = join(directory, 'unit-tests')
  const result =
    existsSync(unit) && /^test result: \w+\. (\d+) passed; (\d+) failed/m.exec(readFileSync(unit, 'utf8'))
  if (result) {
    sum.passed += Number(result[1])
    sum.failed += Number(result[2])
  }
  for (const name of readdirSync(directory).filter((file) => file.endsWith('.json'))) {
    const report = JSON.parse(readFileSync(join(directory, name), 'utf8'))
    sum.passed += report.numPassedTests
    sum.failed += report.numFailedTests + report.numRuntimeErrorTestSuites
  }
  return sum
}

/** Runs a plan; what an outer guest that died has not brought to its end runs again in a new one. */
async function runPlan({ plan, ...outer }) {
  const ended = []
  for (let attempt = 1; ; attempt++) {
    const { results, died } = await runOuter({ ...outer, plan })
    ended.push(...results.filter(({ code }) => code !== null))
    plan = results.filter(({ code }) => code === null)
    if (!died) return [...ended, ...plan]
    if (attempt === ATTEMPTS) throw new ScriptError(`${ATTEMPTS} outer guests have died: ${died}`)
    heading(`  --- the outer guest has died, ${plan.length} steps go on in a new one: ${died}`)
  }
}

async function rig({ only, run: command, bench, all, keep }) {
  const began = Date.now()
  const template = await setup()
  await npmPackages()
  heading('KVM tests in an outer guest with emulated AMD-V')
  await step('tools', () => needPackages({ run, note: '' }, PACKAGES))
  const { vmlinuz, initrd } = await buildRigKernel()
  const { work, log } = workDirectory()
  try {
    const whole = planOf(all ? ALL : SUITE)
    let plan = only ? whole.filter(({ name }) => name.includes(only)) : whole
    if (command) plan = [{ name: 'command', seconds: 600, command }]
    if (bench) plan = [BENCH]
    const moves = plan.some(({ name }) => name === 'portability')
    const store = join(work, 'from-host')
    if (moves) await portability('snapshot for KVM (software CPU)', { AMBERBOX_PORTABLE_TO: store })
    let payload
    const extra = {
      ...(moves && { 'from-host': store }),
      ...(bench && (await benchFiles())),
      ...(plan.some(({ name }) => name === 'unit tests') && (await unitTests(work))),
    }
    await step('payload', async () => {
      payload = await makePayload(work, { template, extra })
    })
    const directory = join(work, 'host')
    mkdirSync(directory)
    const files = { vmlinuz, initrd, root: rootfsPaths().image, payload }
    const results = await runPlan({ files, directory, plan, log })
    if (moves && existsSync(join(directory, 'to-host'))) {
      await portability('snapshots from KVM (software CPU)', {
        AMBERBOX_PORTABLE_FROM: join(directory, 'to-host'),
      })
    }
    heading('')
    for (const result of results) {
      heading(`  ${result.name.padEnd(34)} ${result.took?.toFixed(1).padStart(6)} s  ${outcome(result)}`)
    }
    const { passed, failed } = totals(directory)
    heading(
      `\nIn the outer guest: ${passed} passed, ${failed} failed. All in ${seconds(began)}; console: ${log}`,
    )
    const bad = results.filter(({ code }) => code !== 0).map(({ name }) => name)
    if (bad.length > 0) throw new ScriptError(`Failed in the outer guest: ${bad.join(', ')}`)
  } finally {
    if (keep) heading(`Kept: ${work}`)
    else rmSync(work, { recursive: true, force: true })
  }
}

await main(async () => {
  process.chdir(root)
  const { values } = parseArgs({
    options: {
      only: { type: 'string' },
      run: { type: 'string' },
      bench: { type: 'boolean', default: false },
      all: { type: 'boolean', default: false },
      keep: { type: 'boolean', default: false },
    },
  })
  await rig(values)
})
