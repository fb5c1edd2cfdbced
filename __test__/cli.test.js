'use strict'
/** The command line tool: `amberbox doctor`. */
const { spawn } = require('node:child_process')
const { chmodSync, writeFileSync } = require('node:fs')
const path = require('node:path')
const { advice } = require('../cli/doctor')
const { bin, version } = require('../package.json')
const { ROOT, ownStore } = require('./support')

const store = ownStore()

/** Runs the tool; resolves with its output and exit code. */
function amberbox(args, env = {}) {
  const child = spawn(process.execPath, [path.join(ROOT, bin.amberbox), ...args], {
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const output = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr']) {
    child[name].setEncoding('utf8').on('data', (text) => (output[name] += text))
  }
  return new Promise((done, fail) => {
    child.on('error', fail)
    child.on('close', (code) => done({ code, ...output }))
  })
}

async function doctor(args = [], env = {}) {
  const { code, stdout, stderr } = await amberbox(['doctor', '--json', ...args], env)
  expect(stderr).toBe('')
  return { code, report: JSON.parse(stdout) }
}

describe('doctor', () => {
  test('on this host: a sandbox runs, on the backend that it names', async () => {
    const { code, report } = await doctor()
    expect(report.trial).toMatchObject({ ok: true, backend: report.backend })
    expect({ code, ok: report.ok }).toEqual({ code: 0, ok: true })
    expect(report.versions).toMatchObject({ amberbox: version, node: process.versions.node })
    expect(report.reason).toMatch(/./)
    expect(report.kvm.device.path).toBe('/dev/kvm')
    expect(report.kvm.ms).toBeGreaterThan(0)
    expect(report.store).toMatchObject({ path: store.home, exists: true })
    expect(report.template.path).toMatch(/^\//)
    // Whoever does not have the fastest backend is told why or how.
    if (report.kvm.verdict === 'usable') expect(report.kvm.steps.at(-1).name).toBe('run a guest')
    else expect(report.advice.length).toBeGreaterThan(0)
  })

  test('for people', async () => {
    const { code, stdout, stderr } = await amberbox(['doctor'])
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    for (const part of [
      /^versions +amberbox \d/m,
      /^\/dev\/kvm /m,
      /^backend +(KVM|software CPU): /m,
      /^store /m,
    ]) {
      expect(stdout).toMatch(part)
    }
    expect(stdout).toContain('\nSandboxes can run.\n')
  })

  test('no device', async () => {
    const device = path.join(store.home, 'not-there')
    const { code, report } = await doctor(['--device', device], { AMBERBOX_BACKEND: '' })
    expect(report.kvm).toMatchObject({
      verdict: 'missing',
      steps: [],
      device: { path: device, exists: false },
    })
    expect(report.kvm.detail).toContain(device)
    expect(report).toMatchObject({ backend: 'soft', reason: expect.stringContaining('does not exist') })
    // The trial uses this host's real device.
    expect(code).toBe(0)
  })

  test('another device', async () => {
    const { report } = await doctor(['--device', '/dev/null'])
    expect(report.kvm).toMatchObject({ verdict: 'notkvm', device: { kind: 'character device 1:3' } })
    expect(report.advice).toEqual([expect.stringContaining('10:232')])
    const file = path.join(store.home, 'file')
    writeFileSync(file, 'text')
    const other = await doctor(['--device', file])
    expect(other.report.kvm).toMatchObject({ verdict: 'notkvm', device: { kind: 'not a character device' } })
  })

  // Root may open everything; how the probe takes a refusal is tested in Rust.
  const asUser = process.getuid() === 0 ? test.skip : test
  asUser('no permission', async () => {
    const device = path.join(store.home, 'forbidden')
    writeFileSync(device, '')
    chmodSync(device, 0)
    const { report } = await doctor(['--device', device])
    expect(report.kvm.verdict).toBe('forbidden')
  })

  test('no base template: exit code 1 and what to run', async () => {
    const env = {
      AMBERBOX_HOME: path.join(store.home, 'empty'),
      AMBERBOX_GUEST: path.join(store.home, 'no-guest'),
    }
    const { code, report } = await doctor([], env)
    expect({ code, ok: report.ok }).toEqual({ code: 1, ok: false })
    expect(report.trial).toMatchObject({ ok: false, error: expect.stringContaining('npm run setup') })
    expect(report.template.path).toBeNull()
  })

  test('a backend that does not exist', async () => {
    const { code, report } = await doctor([], { AMBERBOX_BACKEND: 'xen' })
    expect(code).toBe(1)
    expect(report).toMatchObject({
      backend: null,
      override: 'xen',
      reason: expect.stringContaining("'soft' or 'kvm'"),
    })
  })

  test('each verdict has its advice', () => {
    const file = { path: '/dev/kvm', kind: 'character device 10:232', group: 'virt' }
    const of = (verdict, cpu = {}, override = null) => advice({ verdict }, file, cpu, override).join('\n')
    expect(of('usable')).toBe('')
    expect(of('usable', {}, 'soft')).toContain('unset it')
    expect(of('missing', { virtualization: 'svm' })).toContain('modprobe kvm_amd')
    expect(of('missing', { virtualization: 'vmx' })).toContain('modprobe kvm_intel')
    expect(of('missing', { hypervisor: true })).toContain('nested virtualization')
    expect(of('missing')).toContain('firmware')
    expect(of('forbidden')).toMatch(/usermod --append --groups virt /)
    for (const verdict of ['wrong', 'slow', 'hangs']) expect(of(verdict)).toContain('AMBERBOX_BACKEND=kvm')
    for (const verdict of ['notkvm', 'refused', 'host']) expect(of(verdict)).not.toBe('')
  })
})

test('commands and options that do not exist: exit code 2 and what there is', async () => {
  for (const args of [[], ['fly'], ['doctor', '--fast'], ['constructor']]) {
    const { code, stdout, stderr } = await amberbox(args)
    expect({ args, code }).toEqual({ args, code: 2 })
    expect(stdout + stderr).toContain('Usage: amberbox')
  }
  expect(await amberbox(['--version'])).toEqual({ code: 0, stdout: `${version}\n`, stderr: '' })
  const help = await amberbox(['doctor', '--help'])
  expect(help).toMatchObject({ code: 0, stdout: expect.stringContaining('--device') })
})
