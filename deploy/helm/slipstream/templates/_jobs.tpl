{{/* Pods of the Jobs, whose names follow from them. The optimizer's: (list . MODEL). */}}
{{- define "slipstream.optimizerPod" -}}
{{- $model := index . 1 }}
{{- with index . 0 -}}
metadata:
  labels:
    {{- include "slipstream.helperLabels" (list . "optimizer") | nindent 4 }}
spec:
  restartPolicy: Never
  {{- include "slipstream.podBasics" . | trim | nindent 2 }}
  {{- with .Values.gpu.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  containers:
    - name: optimize
      image: {{ include "slipstream.optimizerImage" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args:
        - optimize
        - {{ printf "/source/%s" $model.file | quote }}
        - --repository
        - {{ .Values.models.mountPath | quote }}
        - --name
        - {{ $model.name | quote }}
        {{- range $model.args }}
        - {{ . | quote }}
        {{- end }}
      resources:
        {{- include "slipstream.resources" (list .Values.optimizer.resources (dict "count" .Values.optimizer.gpuCount "resourceName" .Values.gpu.resourceName)) | nindent 8 }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      volumeMounts:
        - name: source
          mountPath: /source
          readOnly: true
        - name: models
          mountPath: {{ .Values.models.mountPath }}
          {{- with .Values.models.subPath }}
          subPath: {{ . }}
          {{- end }}
        - name: tmp
          mountPath: /tmp
  volumes:
    - name: source
      persistentVolumeClaim:
        claimName: {{ .Values.optimizer.source.existingClaim }}
        readOnly: true
    - name: models
      persistentVolumeClaim:
        claimName: {{ include "slipstream.claimName" . }}
    - name: tmp
      emptyDir:
        sizeLimit: {{ .Values.optimizer.tmpSizeLimit }}
  # Variants are chosen by measuring: on the nodes that serve.
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "slipstream.loadTestPod" -}}
metadata:
  labels:
    {{- include "slipstream.helperLabels" (list . "load") | nindent 4 }}
spec:
  restartPolicy: Never
  {{- include "slipstream.podBasics" . | trim | nindent 2 }}
  containers:
    - name: locust
      image: {{ .Values.loadTest.image | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: ["python", "-m", "locust"]
      args:
        - --locustfile=/scripts/locustfile.py
        - --headless
        - --only-summary
        - --users={{ .Values.loadTest.users }}
        - --spawn-rate={{ .Values.loadTest.users }}
        - --run-time={{ .Values.loadTest.runTime }}
        - --host={{ include "slipstream.url" . }}
        - --max-p99-ms={{ .Values.loadTest.maxP99Ms }}
        - --max-refused-share={{ .Values.loadTest.maxRefusedShare }}
        {{- with .Values.loadTest.model }}
        - --model={{ . }}
        {{- end }}
      env:
        - name: HOME
          value: /tmp
      resources:
        {{- toYaml .Values.loadTest.resources | nindent 8 }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      volumeMounts:
        - name: scripts
          mountPath: /scripts
          readOnly: true
        - name: tmp
          mountPath: /tmp
  volumes:
    {{- include "slipstream.scriptsVolume" . | nindent 4 }}
    {{- include "slipstream.tmpVolume" . | nindent 4 }}
{{- end }}
